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
    """Which place goes where: `opening` is P; `shape` (C, S). Two maps between what is packed [T]
    and the conversations' own rows [C * S], flat: `to_rows` (any place where a conversation has
    ended) and `to_pack` (of the T - P after the opening); and the same backwards, for gradients,
    where a place that nothing came from is the one behind the last: `from_rows` [T], `from_pack`
    [C * S]."""

    opening: int
    shape: tuple[int, int]
    to_rows: Tensor
    to_pack: Tensor
    from_rows: Tensor
    from_pack: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], opening: int, device: torch.device) -> Packing:
        """`lengths`: of the conversations, the opening not counted. Nothing is asked of the
        device."""
        own = torch.tensor(lengths)
        columns = torch.arange(max(lengths))
        real = (columns < own[:, None]).flatten()
        number = ((own.cumsum(0) - own)[:, None] + columns).flatten()  # of those after the opening
        to_pack = real.nonzero().flatten()
        maps = (
            torch.where(real, opening + number, 0),
            to_pack,
            torch.cat([torch.full((opening,), len(real)), to_pack]),
            torch.where(real, number, len(to_pack)),
        )
        shape = len(lengths), len(columns)
        return cls(opening, shape, *(table.to(device, non_blocking=True) for table in maps))


class _Moved(torch.autograd.Function):
    """Rows [N, ...] -> rows [M, ...] by the place that each comes from. The gradient is moved the
    same way, by a map of its own: what adds up rows by their number is many times slower."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, back: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(back)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (back,) = ctx.saved_tensors
        nothing = gradient.new_zeros(1, *gradient.shape[1:])
        return torch.cat([gradient, nothing]).index_select(0, back), None, None


def _moved(rows: Tensor, places: Tensor, back: Tensor) -> Tensor:
    moved: Tensor = _Moved.apply(rows, places, back)  # pyright: ignore[reportAssignmentType]
    return moved


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
    opening, (count, longest) = packing.opening, packing.shape
    window = options.get("sliding_window")

    def apart(states: Tensor) -> Tensor:
        """float[1, H, T, E] -> float[C, H, S, E]"""
        flat = _moved(states[0].transpose(0, 1), packing.to_rows, packing.from_rows)
        return flat.unflatten(0, packing.shape).transpose(1, 2)

    def before(states: Tensor) -> Tensor:
        """float[1, H, T, E] -> float[C, H, P + S, E]"""
        shared = states[:, :, :opening].expand(count, -1, -1, -1)
        return torch.cat([shared, apart(states)], dim=2) if opening else apart(states)

    mask = _causal(opening, longest, window, query.device)
    read, _ = _attend(module, apart(query), before(key), before(value), mask, **options)
    flat = read.flatten(0, 1)  # [C * S, H, E]
    found = _moved(flat, packing.to_pack, packing.from_pack)[None]  # [1, T - P, H, E]
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
