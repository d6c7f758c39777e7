"""Prompt-lookup decoding (Saxena 2023): draft tokens from the conversation, verified in one pass.

A forward pass over a few tokens costs little more than one over a single token, whose time is that
of reading the weights. Tokens that repeat an earlier part of the conversation are therefore
proposed as a draft and verified in one pass; a wrong draft costs only the wider pass. The sampled
tokens are the same, except where wider matrix products round differently.

Legend: V text vocabulary, O outputs, W positions of a step, D width, G pieces of a draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmllm.inference.sequence import SequenceState
    from mmllm.model import AnyToAny

_MAX_NGRAM, _MIN_NGRAM = 3, 2
"""Longest and shortest n-gram that must have occurred before."""
_INITIAL_DRAFT_LEN = 2
"""Length of a draft until one was accepted as a whole: float32 products on a CPU read two more
positions nearly as fast as none."""


class PromptLookupDraft:
    """Proposes draft tokens: those that followed the latest earlier occurrence of the last n-gram.

    Example:
        >>> draft = PromptLookupDraft()
        >>> draft.extend([1, 2, 3, 4, 5, 9, 2, 3])
        >>> draft.propose(9)
        [4, 5]
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._positions: dict[tuple[int, ...], int] = {}
        """N-gram -> position after its last occurrence, the one at the end left out."""
        self._draft: list[int] = []
        self._draft_start = 0
        self._was_accepted = False

    def extend(self, ids: Iterable[int]) -> None:
        """Append ids of the conversation."""
        for token in ids:
            for length in range(_MIN_NGRAM, _MAX_NGRAM + 1):
                if length <= len(self._ids):
                    self._positions[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(token)

    def propose(self, max_tokens: int) -> list[int]:
        """Propose the next tokens: two, or, after a draft that was accepted as a whole,
        `max_tokens`; none where the last n-gram has not occurred before."""
        if self._draft:
            end = self._draft_start + len(self._draft)
            self._was_accepted = self._ids[self._draft_start : end] == self._draft
        length = max_tokens if self._was_accepted else min(_INITIAL_DRAFT_LEN, max_tokens)
        self._draft = self._look_up(length)
        self._draft_start = len(self._ids)
        return self._draft

    def _look_up(self, length: int) -> list[int]:
        """`length` tokens after the latest earlier occurrence of the longest known n-gram."""
        for ngram in range(_MAX_NGRAM, _MIN_NGRAM - 1, -1):
            start = self._positions.get(tuple(self._ids[-ngram:]))
            if start is not None:
                period = len(self._ids) - start  # repeat it beyond the end of what is there
                return [self._ids[start + offset % period] for offset in range(length)]
        return []


def verify_draft(
    model: AnyToAny, sequence: SequenceState, draft: Sequence[Sequence[int]], states: Tensor
) -> int:
    """Sample after `next_ids` and after each piece of a draft that was fed behind them, as long as
    the samples equal the draft.

    Args:
        model: the model.
        sequence: the sequence, whose `next_ids` have been accepted.
        draft: G pieces as their ids (`SequenceState.propose_draft`).
        states: hidden states float[W, D] of all that was fed, the draft at the end.

    Returns:
        The number of positions at the end whose draft tokens were rejected.
    """
    num_drafted = sum(map(len, draft))
    ends = list(accumulate(map(len, draft), initial=len(states) - num_drafted))
    logits = model.llm.head(torch.stack([states[end - 1] for end in ends]))  # [1 + G, V + O]
    sequence.advance(int(sequence.sample(logits[0])))
    for index, piece in enumerate(draft):
        if sequence.next_ids != piece:
            return ends[-1] - ends[index]
        sequence.accept(states[ends[index] : ends[index + 1]])
        sequence.advance(int(sequence.sample(logits[index + 1])))
    return 0
