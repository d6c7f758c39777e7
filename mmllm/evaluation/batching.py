"""Eight replies generated in one batch against eight single calls: the same ids, the same media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmllm.conversation import Medium
from mmllm.evaluation.prompts import MAX_NEW_TOKENS, EvalItem, RepliesInBatches


@dataclass(frozen=True)
class Agreement:
    """Comparison of batched with single replies.

    Attributes:
        same: per reply, whether token ids and modalities are equal.
        differences: by modality, `max_difference` of each pair of media; replies with different
            modalities add no pair.
    """

    same: tuple[bool, ...]
    differences: Mapping[str, Sequence[float]]


def compare(chat: RepliesInBatches, items: Sequence[EvalItem]) -> Agreement:
    """Generate the replies in one batch, then one by one with the same seeds, and compare them.

    Args:
        chat: the model.
        items: test items, of which the first turn is answered.

    Returns:
        For each item whether token ids and modalities agree, and the differences of the media.
    """
    conversations = [item.turns[0] for item in items]
    seeds = [item.seed for item in items]
    batched = chat.reply_many(conversations, seeds=seeds, max_new_tokens=MAX_NEW_TOKENS)
    single = [
        chat.reply_many([conversation], seeds=[seed], max_new_tokens=MAX_NEW_TOKENS)[0]
        for conversation, seed in zip(conversations, seeds, strict=True)
    ]
    same, differences = [], {}
    for left, right in zip(batched, single, strict=True):
        modalities = [[medium.modality for medium in reply.media] for reply in (left, right)]
        same.append(left.ids == right.ids and modalities[0] == modalities[1])
        if modalities[0] == modalities[1]:
            for a, b in zip(left.media, right.media, strict=True):
                differences.setdefault(a.modality, []).append(max_difference(a, b))
    return Agreement(tuple(same), differences)


def max_difference(left: Medium, right: Medium) -> float:
    """Return the largest difference of two media, on the scale 0 to 1 (audio: -1 to 1).

    Images and videos are 8-bit: a value on the edge between two levels may be rounded to either
    side, so a difference of one level does not count, but then the mean difference does.

    Args:
        left: a medium.
        right: a medium of the same modality.

    Returns:
        The difference; infinity if the shapes differ.
    """
    a, b = left.to_numpy(), right.to_numpy()
    if a.shape != b.shape:
        return float("inf")
    if a.dtype != np.uint8:
        return float(np.abs(a - b).max())
    difference = np.abs(a.astype(int) - b.astype(int))
    return float(max(difference.max() - 1, difference.mean(), 0) / 255)
