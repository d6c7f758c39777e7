"""Does a reply name the concept? Whole words, case ignored, the longest name wins.

A name is a label or a listed synonym, trained on or not. A name that two concepts share names
both, and a reply that names two concepts is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


class Names:
    """What the concepts of one vocabulary are called."""

    def __init__(self, concepts: Iterable[Mapping[str, Any]]):
        """Rows with `id`, `label`, `synonyms` and `heldout_synonyms`, as concepts.json has them."""
        self._owners: dict[str, set[str]] = {}
        for concept in concepts:
            for name in (
                concept["label"],
                *concept.get("synonyms", ()),
                *concept.get("heldout_synonyms", ()),
            ):
                self._owners.setdefault(_plain(name), set()).add(concept["id"])
        longest_first = sorted(self._owners, key=len, reverse=True)
        names = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._pattern = re.compile(rf"(?<!\w)(?:{names})(?!\w)")

    def named(self, text: str) -> set[str]:
        """Ids of all concepts that the text names."""
        found: set[str] = set()
        for name in self._pattern.findall(_plain(text)):
            found |= self._owners[name]
        return found

    def names(self, text: str, concept: str) -> bool:
        """Whether the text names this concept and no other."""
        return self.named(text) == {concept}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
