"""Which thing a medium shows and which words name it: labels for positions of conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from mmllm import mini
from mmllm.conversation import Medium
from mmllm.data.sources import read_text


class ConceptVocabulary:
    """Names of things, and the files that show them.

    Args:
        names: concept -> the words for it.
        files: path of a medium, resolved -> concept. A medium that is not listed is looked up by
            its caption.

    Attributes:
        names: concept -> the words for it.
        concepts: the concepts, sorted.
    """

    def __init__(self, names: Mapping[str, Sequence[str]], files: Mapping[str, str] | None = None):
        self.names = {concept: tuple(words) for concept, words in names.items()}
        self.concepts = sorted(self.names)
        self._files = dict(files or {})

    def of_medium(self, medium: Medium) -> str | None:
        """The concept that a medium shows; None if it is unknown, or not one alone."""
        if isinstance(medium.source, str | Path):
            found = self._files.get(str(Path(medium.source).resolve()))
            if found is not None:
                return found
        named = {concept for _, _, concept in self.in_text(medium.caption or "")}
        return named.pop() if len(named) == 1 else None

    def in_text(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, concept) of each name in a text: whole words, the longest first."""
        matches = self._pattern.finditer(text.casefold())
        return [(*match.span(), self._by_word[match[0]]) for match in matches]

    @cached_property
    def _by_word(self) -> dict[str, str]:
        by_word: dict[str, str] = {}
        for concept, words in self.names.items():
            for word in words:
                by_word.setdefault(word.casefold(), concept)
        return by_word

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        words = sorted(self._by_word, key=len, reverse=True)
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words)) or '(?!)'})(?!\w)")


def mini_vocabulary() -> ConceptVocabulary:
    """The things of mini's data: what shows them, and what they are called. What sounds has the
    name of the thing that is seen, where there is one."""
    data = mini.locate("data")
    visible = json.loads(read_text(data / "concepts.json"))
    sounds = json.loads(read_text(data / "sounds.json.gz"))
    names: dict[str, list[str]] = {}
    for entry in visible:
        names[entry["id"]] = [entry["label"], *entry["synonyms"], *entry["heldout_synonyms"]]
    thing = {entry["id"]: entry["picture"] or entry["id"] for entry in sounds["concepts"]}
    for entry in sounds["concepts"]:
        names.setdefault(thing[entry["id"]], []).append(entry["label"])
    items = [*json.loads(read_text(data / "items.json.gz")), *sounds["items"]]
    files = {
        str((data / item["file"]).resolve()): thing.get(item["concept"], item["concept"])
        if item["modality"] == "audio"
        else item["concept"]
        for item in items
    }
    return ConceptVocabulary(names, files)
