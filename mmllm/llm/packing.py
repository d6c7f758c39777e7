"""Attention over conversations that are packed into one row, without a mask of T x T.

Linear layers see the row as it is, without padding. For attention alone each conversation becomes a
row of its own, whose keys begin with the opening that all of them share (a system prompt, say),
which stands in the pack once. Time and memory are those of the conversations one by one.
Legend: C conversations, P positions of the opening, S of the longest conversation after it,
T = P + all that follows, H heads (those of keys may be fewer), E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KERNEL = "sdpa_packed"
"""What transformers calls this attention; without a Packing it is its `sdpa`."""
SHORT = 256
"""Keys up to which plain products have the faster gradient on a CPU; the fused kernel's is made for
long rows."""
LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that it knows."""


@dataclass(frozen=True)
class Packing:
    """`opening` is P; `rows` int[C, S]: the packed position of each conversation's own positions
    (0 where it has ended); `order` int[T - P]: where in the flat C * S each packed one stands."""

    opening: int
    rows: Tensor
    order: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], opening: int, device: torch.device) -> Packing:
        """`lengths`: of the conversations, the opening not counted. Nothing is asked of the
        device."""
        own = torch.tensor(lengths)
        columns = torch.arange(max(lengths))
        real = columns < own[:, None]
        rows = torch.where(real, opening + (own.cumsum(0) - own)[:, None] + columns, 0)
        order = real.flatten().nonzero().flatten()
        return cls(opening, rows.to(device, non_blocking=True), order.to(device, non_blocking=True))


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query, key and value float[1, H, T, E] ->
    float[1, T, H, E]."""
    if packing is None:
        return _attend(module, query, key, value, attention_mask, **options)
    opening, (count, longest) = packing.opening, packing.rows.shape
    window = options.get("sliding_window")

    def apart(states: Tensor) -> Tensor:
        """float[1, H, T, E] -> float[C, H, S, E]"""
        flat = states[0].transpose(0, 1).index_select(0, packing.rows.flatten())
        return flat.unflatten(0, (count, longest)).transpose(1, 2)

    def before(states: Tensor) -> Tensor:
        """float[1, H, T, E] -> float[C, H, P + S, E]"""
        shared = states[:, :, :opening].expand(count, -1, -1, -1)
        return torch.cat([shared, apart(states)], dim=2) if opening else apart(states)

    mask = _causal(opening, longest, window, query.device)
    found, _ = _attend(
        module, apart(query), before(key), before(value), mask, **options
    )  # [C, S, H, E]
    found = found.flatten(0, 1).index_select(0, packing.order)[None]  # [1, T - P, H, E]
    if opening == 0:
        return found, None
    first, _ = _attend(
        module,
        query[:, :, :opening],
        key[:, :, :opening],
        value[:, :, :opening],
        _causal(0, opening, window, query.device),
        **options,
    )
    return torch.cat([first, found], dim=1), None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, or the same by plain products where that trains faster."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    short = query.device.type == "cpu" and query.requires_grad and key.shape[2] <= SHORT
    if not short or options.get("dropout") or (mask is not None and mask.dtype != torch.bool):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if mask is None:
        (own, seen) = query.shape[2], key.shape[2]
        mask = torch.ones(own, seen, dtype=torch.bool).tril(seen - own)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    scores = (query * scale) @ key.transpose(2, 3)  # [B, H, S, P + S]
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2), None


def register() -> None:
    """Make the kernel known to transformers, masks included."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(KERNEL, attend)
    AttentionMaskInterface.register(KERNEL, sdpa_mask)


def no_mask(embeds: Tensor) -> Tensor:
    """A mask that transformers takes as made already and that no other attention could use: a
    family that does not hand the Packing on fails instead of mixing conversations."""
    return embeds.new_zeros(1, 1, 0, 0, dtype=torch.bool)


def _causal(before: int, own: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool[own, before + own]: what each position sees, itself the last; None: plainly causal."""
    if before == 0 and (window is None or own <= window):
        return None
    behind = torch.arange(before, before + own, device=device)[:, None] - torch.arange(
        before + own, device=device
    )
    seen = behind >= 0
    return (seen if window is None else seen & (behind < window))[None, None]
