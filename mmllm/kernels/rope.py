"""Rotary position embedding (Su et al. 2021).

Legend: N positions, H heads, E their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rope_cos_sin(rotary: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the tables of `apply_rope` by a model's own rotary embedding.

    Args:
        rotary: transformers' rotary module of the model.
        x: float[N, D], for its dtype and device.
        positions: int[N].

    Returns:
        cos and sin, float[N, 1, E] each; the first half of `sin` is negated.
    """
    cos, sin = (table[0, :, None] for table in rotary(x[None], positions[None]))
    first_half, second_half = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first_half, second_half), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, direction: int = 1) -> Tensor:
    """Rotate queries or keys by their positions.

    Args:
        x: float[N, H, E].
        cos: the cosine table of `rope_cos_sin`.
        sin: the sine table.
        direction: 1; -1 rotates back, which is the gradient.
    """
    first_half, second_half = x.chunk(2, dim=-1)
    swapped = torch.cat((second_half, first_half), dim=-1)
    return torch.addcmul(x * cos, swapped, sin, value=direction)


class RoPEFn(torch.autograd.Function):
    """`apply_rope` under autograd: the gradient is rotated back, and only the tables are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(cos, sin)
        return apply_rope(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return apply_rope(grads[0], cos, sin, -1), None, None
