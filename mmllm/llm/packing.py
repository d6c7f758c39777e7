"""Attention over conversations that are packed into one row, without a mask of T x T.

Linear layers see the row as it is, without padding. For attention alone each conversation becomes a
row of its own, whose keys begin with the opening that all of them share (a system prompt, say),
which stands in the pack once; conversations of like length make a group. Time and memory are those
of the conversations one by one.
Legend: C conversations of a group, P positions of the opening, S of the group's longest
conversation after it, T = P + all that follows, N = the groups' C * S together, H heads, K heads of
keys, G = H / K, E their width, L keys.
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
GROUP = 10_000
"""Pairs of a query and a key whose time on a CPU is that of a group more."""
LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that it knows."""


@dataclass(frozen=True)
class Packing:
    """Which place goes where: `opening` is P; `shapes` (C, S) of each group. Two maps between what
    follows the opening in the pack [T - P] and the groups' rows [N], flat: `to_rows` (any place
    where a conversation has ended) and `to_pack`; and `from_pack` [N], which is `to_rows` with the
    place behind the last one where a conversation has ended."""

    opening: int
    shapes: tuple[tuple[int, int], ...]
    to_rows: Tensor
    to_pack: Tensor
    from_pack: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], opening: int, device: torch.device) -> Packing:
        """`lengths`: of the conversations, the opening not counted. Nothing is asked of the
        device."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        own = torch.tensor(lengths)
        starts = own.cumsum(0) - own
        shapes, numbers, reals = [], [], []
        for size in _groups([lengths[index] for index in order], opening, device):
            members, order = torch.tensor(order[:size]), order[size:]
            columns = torch.arange(int(own[members[0]]))
            shapes.append((size, len(columns)))
            numbers.append((starts[members, None] + columns).flatten())
            reals.append((columns < own[members, None]).flatten())
        number, real = torch.cat(numbers), torch.cat(reals)
        to_pack = torch.empty(sum(lengths), dtype=torch.long)
        to_pack[number[real]] = real.nonzero().flatten()
        maps = (
            torch.where(real, number, 0),
            to_pack,
            torch.where(real, number, len(to_pack)),
        )
        return cls(opening, tuple(shapes), *(table.to(device, non_blocking=True) for table in maps))


def _groups(lengths: Sequence[int], opening: int, device: torch.device) -> list[int]:
    """How many of the conversations, longest first, make each group: the least padding, where a
    group is worth its own calls. An accelerator, whose calls cost more than its padding, has one.
    """
    if device.type != "cpu":
        return [len(lengths)]
    best = [(0, 0)]  # for the first n conversations: (cost, size of the last group)
    for stop in range(1, len(lengths) + 1):
        best.append(
            min(
                (
                    best[start][0]
                    + (stop - start) * lengths[start] * (opening + lengths[start])
                    + GROUP,
                    stop - start,
                )
                for start in range(stop)
            )
        )
    sizes, stop = [], len(lengths)
    while stop:
        sizes.append(best[stop][1])
        stop -= sizes[-1]
    return sizes[::-1]


class _Apart(torch.autograd.Function):
    """What is packed, float[T, H, E], -> its opening float[P, H, E] and the groups' rows
    float[N, H, E]. The gradient is moved by a map of its own, since what adds up rows by their
    number is many times slower."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, states: Tensor, opening: int, to_rows: Tensor, to_pack: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(to_pack)
        return states[:opening].clone(), states[opening:].index_select(0, to_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _packed(*gradients, *ctx.saved_tensors), None, None, None


class _Together(torch.autograd.Function):
    """The opening float[P, H, E] and the groups' rows float[N, H, E] -> what is packed,
    float[T, H, E]."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, first: Tensor, rows: Tensor, to_pack: Tensor, from_pack: Tensor
    ) -> Tensor:
        ctx.save_for_backward(from_pack)
        ctx.opening = len(first)
        return _packed(first, rows, to_pack)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (from_pack,) = ctx.saved_tensors
        first, rest = gradient[: ctx.opening], gradient[ctx.opening :]
        nothing = rest.new_zeros(1, *rest.shape[1:])
        return first, torch.cat([rest, nothing]).index_select(0, from_pack), None, None


def _packed(first: Tensor, rows: Tensor, to_pack: Tensor) -> Tensor:
    found = rows.new_empty(len(first) + len(to_pack), *rows.shape[1:])
    found[: len(first)] = first
    torch.index_select(rows, 0, to_pack, out=found[len(first) :])
    return found


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
    opening, window = packing.opening, options.get("sliding_window")
    (query, key, value), *rows = zip(
        *(_apart(states, packing) for states in (query, key, value)), strict=True
    )
    reads = []
    for (_, longest), (own, keys, values) in zip(packing.shapes, rows, strict=True):
        mask = _causal(opening, longest, window, query.device)
        keys, values = _behind(key, keys), _behind(value, values)
        reads.append(_attend(module, own, keys, values, mask, **options)[0].flatten(0, 1))
    read = reads[0][:0]
    if opening:
        mask = _causal(0, opening, window, query.device)
        read = _attend(module, query, key, value, mask, **options)[0][0]
    found: Tensor = _Together.apply(  # pyright: ignore
        read, torch.cat(reads), packing.to_pack, packing.from_pack
    )
    return found[None], None


def _apart(states: Tensor, packing: Packing) -> list[Tensor]:
    """float[1, H, T, E] -> the opening float[1, H, P, E], then float[C, H, S, E] of each group."""
    first, flat = _Apart.apply(  # pyright: ignore
        states[0].transpose(0, 1), packing.opening, packing.to_rows, packing.to_pack
    )
    parts = flat.split([count * longest for count, longest in packing.shapes])
    groups = zip(parts, packing.shapes, strict=True)
    return [
        first.transpose(0, 1)[None],
        *(part.unflatten(0, shape).transpose(1, 2) for part, shape in groups),
    ]


def _behind(opening: Tensor, own: Tensor) -> Tensor:
    """The keys that a group's conversations see: float[1, K, P, E] before float[C, K, S, E]."""
    if opening.shape[2] == 0:
        return own
    return torch.cat([opening.expand(len(own), -1, -1, -1), own], dim=2)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, or the same by plain products where that trains faster."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    short = query.device.type == "cpu" and query.requires_grad and key.shape[2] <= SHORT
    plain = mask is None or mask.dtype == torch.bool
    if not (short and plain and query.dtype == key.dtype == value.dtype) or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is None:
        (own, seen) = query.shape[2], key.shape[2]
        mask = torch.ones(own, seen, dtype=torch.bool).tril(seen - own)[None, None]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    read: Tensor = _Plain.apply(query, key, value, mask, scale)  # pyright: ignore
    return read, None


class _Plain(torch.autograd.Function):
    """Attention by plain products: float[B, H, S, E], float[B, K, L, E] twice and what is seen,
    bool[B, 1, S, L], -> float[B, S, H, E]. Heads that share keys are rows of one product, and of
    what is between the products only the softmax is kept."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        batch, heads, own, _ = query.shape
        query = (query * scale).reshape(batch, key.shape[1], -1, query.shape[-1])
        scores = query @ key.transpose(2, 3)  # [B, K, G * S, L]
        by_head = scores.view(batch, heads, own, -1)
        by_head.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return (weights @ value).view(batch, heads, own, -1).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        query, key, value, weights = ctx.saved_tensors
        batch, own, heads, _ = gradient.shape
        gradient = gradient.transpose(1, 2).reshape(batch, key.shape[1], -1, value.shape[-1])
        by_weights = gradient @ value.transpose(2, 3)
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        by_query = (by_scores @ key).mul_(ctx.scale).view(batch, heads, own, -1)
        by_key = by_scores.transpose(2, 3) @ query
        return by_query, by_key, weights.transpose(2, 3) @ gradient, None, None


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
