"""Which concepts does a text name? Whole words, case-insensitive, the longest label first.

A concept is named by its label or a listed synonym, whether trained on or not. A name that two
concepts share counts for both, and a text that names two concepts names neither uniquely.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


class LabelMatcher:
    """Finds the labels and synonyms of a vocabulary of concepts in text."""

    def __init__(self, concepts: Iterable[Mapping[str, Any]]):
        """`concepts`: rows with `id`, `label`, `synonyms` and `heldout_synonyms`, as in
        concepts.json."""
        self._concepts: dict[str, set[str]] = {}
        for concept in concepts:
            for label in (
                concept["label"],
                *concept.get("synonyms", ()),
                *concept.get("heldout_synonyms", ()),
            ):
                self._concepts.setdefault(_normalized(label), set()).add(concept["id"])
        longest_first = sorted(self._concepts, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")

    def match(self, text: str) -> set[str]:
        """The ids of all concepts that the text names."""
        ids: set[str] = set()
        for label in self._pattern.findall(_normalized(text)):
            ids |= self._concepts[label]
        return ids

    def matches_only(self, text: str, concept: str) -> bool:
        """Return whether a text names one concept and no other.

        Args:
            text: the text, for example a reply.
            concept: the concept.
        """
        return self.match(text) == {concept}


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())
