"""Guessing what comes next from what was said before (prompt lookup decoding, Saxena 2023).

A forward pass over a few tokens costs little more than one over a single token, whose time is that
of reading the weights. What repeats itself in a conversation is therefore guessed and checked in
one pass; a wrong guess costs what the pass was wider. What is said stays the same, but for the
rounding of wider products.
"""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST, _SHORTEST = 3, 2
"""Tokens that must have stood in a row before."""
_FEW = 2
"""Tokens guessed at once until a whole guess was right: what float32 products on a CPU read nearly
as fast as one."""


class PromptLookupDraft:
    """The tokens of a conversation, as they come."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Behind which place some tokens in a row stood last, what stands at the end left out."""
        self._guess: list[int] = []
        self._guessed_at = 0
        self._sure = False

    def add(self, ids: Iterable[int]) -> None:
        """Note what was said."""
        for token in ids:
            for num in range(_SHORTEST, _LONGEST + 1):
                if num <= len(self._ids):
                    self._after[tuple(self._ids[-num:])] = len(self._ids)
            self._ids.append(token)

    def propose(self, most: int) -> list[int]:
        """Tokens that stood where the longest known end of it stood before: two, or, where the last
        guess was right, so many."""
        if self._guess:
            stop = self._guessed_at + len(self._guess)
            self._sure = self._ids[self._guessed_at : stop] == self._guess
        self._guess = self._found(most if self._sure else min(_FEW, most))
        self._guessed_at = len(self._ids)
        return self._guess

    def _found(self, num: int) -> list[int]:
        for known in range(_LONGEST, _SHORTEST - 1, -1):
            start = self._after.get(tuple(self._ids[-known:]))
            if start is not None:
                period = len(self._ids) - start  # what goes round goes on
                return [self._ids[start + place % period] for place in range(num)]
        return []
