"""Eight replies in one batch against eight single calls: the same ids, the same media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmllm.conversation import Medium
from mmllm.evaluation.asking import MAX_NEW_TOKENS, Asked, Question


@dataclass(frozen=True)
class Agreement:
    """`same`: per reply, whether ids and modalities agree. `differences`: by modality, of each
    pair of media, as `difference` has it; media that do not correspond make no pair."""

    same: tuple[bool, ...]
    differences: Mapping[str, Sequence[float]]


def compare(chat: Asked, questions: Sequence[Question]) -> Agreement:
    """Ask all at once, then one by one, with the same seeds."""
    talks = [question.turns[0] for question in questions]
    seeds = [question.seed for question in questions]
    together = chat.reply_many(talks, seeds=seeds, max_new_tokens=MAX_NEW_TOKENS)
    alone = [
        chat.reply_many([talk], seeds=[seed], max_new_tokens=MAX_NEW_TOKENS)[0]
        for talk, seed in zip(talks, seeds, strict=True)
    ]
    same, differences = [], {}
    for one, other in zip(together, alone, strict=True):
        kinds = [[medium.modality for medium in reply.media] for reply in (one, other)]
        same.append(one.ids == other.ids and kinds[0] == kinds[1])
        if kinds[0] == kinds[1]:
            for a, b in zip(one.media, other.media, strict=True):
                differences.setdefault(a.modality, []).append(difference(a, b))
    return Agreement(tuple(same), differences)


def difference(one: Medium, other: Medium) -> float:
    """Of two media on the scale 0 to 1 (sounds: -1 to 1): the largest of any value.

    Pictures and clips are 8-bit: a value on the edge between two levels may fall on either side,
    so one level is not counted, but the mean difference then is.
    """
    a, b = one.to_numpy(), other.to_numpy()
    if a.shape != b.shape:
        return float("inf")
    if a.dtype != np.uint8:
        return float(np.abs(a - b).max())
    apart = np.abs(a.astype(int) - b.astype(int))
    return float(max(apart.max() - 1, apart.mean(), 0) / 255)
