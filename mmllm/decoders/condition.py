"""Conditions before a pipeline takes them: their shapes are checked, their masks made binary.

Legend: M media, P positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.decoders.contract import Condition, DecoderContract


def check_condition(decoder: DecoderContract, condition: Condition, num: int) -> None:
    """Check that a condition has exactly the tensors of `condition_shapes`, one row per medium.

    Args:
        decoder: the decoder that is to take it.
        condition: the condition.
        num: M.

    Raises:
        ValueError: it has other tensors or shapes, or M is 0.
    """
    got = {name: tuple(value.shape) for name, value in condition.items()}
    expected = {name: (num, *shape) for name, shape in decoder.condition_shapes.items()}
    if num < 1 or got != expected:
        raise ValueError(
            f"{decoder.modality}: expected a condition {expected} for {num} media, by the configs "
            f"in {decoder.folder}, got {got}; was the output projection trained for another "
            "decoder, or is a generator missing?"
        )


def binary_mask(mask: Tensor) -> Tensor:
    """Round a predicted mask to 0 or 1: float[M, P] -> float[M, P].

    If no value is above 0.5, the highest position is kept, because attention over no position is
    not defined. The result is tied to its input by a gradient of zero, so that a distributed
    reducer never waits for the parameters that predict the mask.
    """
    real = mask > 0.5
    best = F.one_hot(mask.argmax(-1), mask.shape[-1]).bool()
    real = real | (best & ~real.any(-1, keepdim=True))
    return real.to(mask.dtype) + 0.0 * mask


def encode_each(captions: Sequence[str], encode: Callable[[str], Condition]) -> Condition:
    """Encode captions one by one, for pipelines that cannot read captions of different lengths.

    Args:
        captions: M >= 1 captions.
        encode: encodes one to tensors of one row.

    Returns:
        The tensors of all, each of M rows.
    """
    rows = [encode(caption) for caption in captions]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def padded(sequence: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Pad sequences that have no padding with zeros.

    Args:
        sequence: float[M, up to P, E].
        tokens: P.

    Returns:
        float[M, P, E], and the mask [M, P] of what was there.
    """
    padding = tokens - sequence.shape[1]
    mask = sequence.new_ones(sequence.shape[:2])
    return F.pad(sequence, (0, 0, 0, padding)), F.pad(mask, (0, padding))


def unpadded(sequence: Tensor, mask: Tensor) -> Tensor:
    """Cut one sequence to the positions of its mask, for pipelines that read every position.

    Args:
        sequence: float[1, P, E].
        mask: [1, P], 0 or 1.

    Returns:
        float[1, positions where the mask is 1, E], tied to the mask by a gradient of zero.
    """
    return (sequence * mask[..., None])[:, mask[0] > 0.5]


def zero_masked(condition: Condition, masks: Mapping[str, str]) -> Condition:
    """Return a condition in float32, with zeros where a mask is 0.

    Args:
        condition: M conditions.
        masks: sequence tensor -> the mask over its positions.
    """
    condition = {name: value.float() for name, value in condition.items()}
    for sequence, mask in masks.items():
        condition[sequence] = condition[sequence] * condition[mask][..., None]
    return condition
