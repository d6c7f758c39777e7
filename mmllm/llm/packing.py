"""Attention over conversations that are packed into one row, without a mask of T x T.

Linear layers see the row as it is, without padding. For attention alone each conversation becomes a
row of its own, whose keys begin with the opening that all of them share (a system prompt, say),
which stands in the pack once; conversations of like length make a group. Time and memory are those
of the conversations one by one.
Legend: C conversations of a group, P positions of the opening that they see, S of the group's
longest conversation after it, L = P + S, T positions of the pack, N = the groups' C * S together,
or C * L for keys; H heads, K heads of keys, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmllm.precision import moved

KERNEL = "sdpa_packed"
"""What transformers calls this attention; without a Packing it is its `sdpa`."""
SHORT = 256
"""Keys up to which plain products have the faster gradient on a CPU; the fused kernel's is made for
long rows."""
GROUP = 20_000
"""Pairs of a query and a key whose time on a CPU is that of a group more."""
ALIGNED = 4
"""L is a multiple of it: products of odd widths take a fifth longer on a CPU."""
LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that it knows."""


@dataclass(frozen=True, eq=False)
class _Group:
    """C conversations that see `before` (P) positions of the opening. `places` int[C, S]: where
    they stand in the pack; anywhere where `real` bool[C, S] says that one has ended."""

    before: int
    places: Tensor
    real: Tensor

    @property
    def count(self) -> int:
        return len(self.places)

    @property
    def own(self) -> int:
        """S"""
        return self.places.shape[1]

    @property
    def seen(self) -> int:
        """L"""
        return self.before + self.own


@dataclass(frozen=True)
class _Map:
    """Which of T rows stands in which of N, and the other way round: `take` int[N], `back` int[T];
    in the rows `empty` stands none, and in `openings` int[C, P] the first P of T once more, for
    each of all conversations. With heads each row is that of one head."""

    take: Tensor
    back: Tensor
    empty: Tensor
    openings: Tensor

    def spread(self, rows: Tensor) -> Tensor:
        """float[T, E] -> float[N, E], anything in those that are empty."""
        return rows.index_select(0, self.take)

    def gather(self, rows: Tensor) -> Tensor:
        """float[N, E] -> float[T, E]"""
        return rows.index_select(0, self.back)

    def sum(self, rows: Tensor) -> Tensor:
        """float[N, E] -> float[T, E], what stands in several rows added up: the gradient of
        `spread`."""
        found = self.gather(rows)
        if before := self.openings.shape[1]:
            again = rows.index_select(0, self.openings.flatten())
            found[:before] += again.view(*self.openings.shape, -1).sum(0)
        return found


class Packing:
    """Which place goes where, for all layers of one forward pass."""

    def __init__(self, groups: Sequence[_Group], device: torch.device):
        self.groups = tuple(groups)
        self.device = device
        self._made: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def of(cls, lengths: Sequence[int], opening: int, device: torch.device) -> Packing:
        """`lengths`: of the conversations, the opening not counted. Nothing is asked of the
        device. The opening is a group of its own."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        own = torch.tensor(lengths)
        starts = opening + own.cumsum(0) - own
        groups = []
        if opening:
            groups.append(_group(torch.tensor([0]), torch.tensor([opening]), 0))
        for size in _groups([lengths[index] for index in order], opening, device):
            members, order = torch.tensor(order[:size]), order[size:]
            groups.append(_group(starts[members], own[members], opening))
        return cls(groups, device)

    def map(self, heads: int, *, keys: bool) -> _Map:
        """For rows of `heads` heads in the pack, int[T * heads], and by head in a group: of keys
        [C, heads, L], or of what asks for them [C, heads, S]."""
        return self._once(_map, self.groups, heads, keys, self.device)

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """What each position of a group sees, bool[1, 1, S, L]; None: all up to itself."""
        group = self.groups[index]
        if group.before == 0 and (window is None or group.own <= window):
            return None
        return self._once(_seen, group.own, group.seen, window, self.device)

    def bias(self, index: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The same as what is added to scores: float[1, 1, S, L]."""
        group = self.groups[index]
        return self._once(_bias, group.own, group.seen, window, self.device, dtype)

    def shares(self, heads: int, shared: int) -> tuple[_Share, _Share]:
        """Of what is spread over the groups, by all `heads` and by those that are `shared`."""
        return self._once(_shares, self.groups, heads, shared)

    def _once(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` gives, for all layers."""
        if (make, *arguments) not in self._made:
            self._made[make, *arguments] = make(*arguments)
        return self._made[make, *arguments]


_Share = tuple[list[int], list[int]]
"""How many rows are each group's, and of how many products with shared keys."""


def _shares(groups: tuple[_Group, ...], heads: int, shared: int) -> tuple[_Share, _Share]:
    products = [group.count * shared for group in groups]
    asks = [group.count * heads * group.own for group in groups]
    holds = [group.count * shared * group.seen for group in groups]
    return (asks, products), (holds, products)


def _map(groups: tuple[_Group, ...], heads: int, keys: bool, device: torch.device) -> _Map:
    places, reals, openings, offset = [], [], [], 0
    head = torch.arange(heads)[:, None]
    for group in groups:
        place, real = group.places, group.real
        if keys:
            opening = torch.arange(group.before).expand(group.count, -1)
            place = torch.cat([opening, place], dim=1)
            real = torch.cat([torch.zeros_like(opening, dtype=torch.bool), real], dim=1)
            if group.before:
                rows = offset + torch.arange(group.count * heads * group.seen)
                rows = rows.view(group.count, heads, -1)[:, :, : group.before]
                openings.append(rows.transpose(1, 2).flatten(1))
            offset += group.count * heads * group.seen
        places.append((place[:, None] * heads + head).flatten())
        reals.append(real[:, None].expand(-1, heads, -1).flatten())
    take, real = torch.cat(places), torch.cat(reals)
    back = torch.empty(int(real.sum()), dtype=torch.long)
    back[take[real]] = real.nonzero().flatten()
    again = torch.cat(openings) if openings else torch.empty(0, 0, dtype=torch.long)
    found = take, back, (~real).nonzero().flatten(), again
    return _Map(*(moved(table, device) for table in found))


def _group(starts: Tensor, own: Tensor, before: int) -> _Group:
    """Conversations that start at int[C] and have int[C] positions, the longest first."""
    longest = -(-(before + int(own[0])) // ALIGNED) * ALIGNED - before
    columns = torch.arange(longest)
    real = columns < own[:, None]
    return _Group(before, torch.where(real, starts[:, None] + columns, 0), real)


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
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend_pack(module, q, k, v, packing, **options)[None], None


@torch.compiler.disable()  # every batch has shapes of its own
def attend_pack(
    module: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, **options: Any
) -> Tensor:
    """float[T, H, E], float[T, K, E] twice -> float[T, H, E]; `options` are `attend`'s."""
    window = options.get("sliding_window")
    pack = query, key, value
    short = max(group.seen for group in packing.groups) <= SHORT
    if short and _is_plain(query, key, value, options):
        scale = _scale(query, options)
        return _PlainPacked.apply(*pack, packing, window, scale)  # pyright: ignore
    rows = [
        _Apart.apply(states, packing, keys)  # pyright: ignore
        for states, keys in zip(pack, (False, True, True), strict=True)
    ]
    owns = [group.count * group.own for group in packing.groups]
    seens = [group.count * group.seen for group in packing.groups]
    split = [row.split(sizes) for row, sizes in zip(rows, (owns, seens, seens), strict=True)]
    reads = []
    for index, (group, *parts) in enumerate(zip(packing.groups, *split, strict=True)):
        own, *seen = (part.unflatten(0, (group.count, -1)).transpose(1, 2) for part in parts)
        read, _ = _attend(module, own, seen[0], seen[1], packing.mask(index, window), **options)
        reads.append(read.flatten(0, 1))
    return _Together.apply(torch.cat(reads), packing)  # pyright: ignore


class _Apart(torch.autograd.Function):
    """What is packed, float[T, H, E], -> the groups' rows float[N, H, E]. The gradient is moved by
    a map of its own, since what adds up rows by their number is many times slower."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing, keys: bool) -> Tensor:  # pyright: ignore
        ctx.packing, ctx.keys = packing, keys
        return packing.map(1, keys=keys).spread(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.keys:
            return ctx.packing.map(1, keys=False).gather(gradients[0]), None, None
        found = ctx.packing.map(1, keys=True).sum(gradients[0].flatten(1))
        return found.view(-1, *gradients[0].shape[1:]), None, None


class _Together(torch.autograd.Function):
    """The groups' rows float[N, H, E] -> what is packed, float[T, H, E]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packing: Packing) -> Tensor:  # pyright: ignore
        ctx.packing = packing
        return packing.map(1, keys=False).gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        places = ctx.packing.map(1, keys=False)
        return places.spread(gradients[0]).index_fill_(0, places.empty, 0), None


class _PlainPacked(torch.autograd.Function):
    """Packed attention by plain products: float[T, H, E], float[T, K, E] twice -> float[T, H, E].
    What groups read lies by head, so that nothing is turned or joined for a product."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        window: int | None,
        scale: float,
    ) -> Tensor:
        heads, shared, width = query.shape[1], key.shape[1], query.shape[2]
        asks, holds = packing.map(heads, keys=False), packing.map(shared, keys=True)
        own = asks.spread(query.reshape(-1, width))
        keys, values = (holds.spread(states.reshape(-1, width)) for states in (key, value))
        read = torch.empty_like(own)
        asked, held = packing.shares(heads, shared)
        parts = [*_by_group([own, read], *asked), *_by_group([keys, values], *held)]
        saved = []
        for index, (queries, out, *seen) in enumerate(zip(*parts, strict=True)):
            weights = _weights(queries, seen[0], packing.bias(index, window, own.dtype), scale)
            torch.bmm(weights, seen[1], out=out)
            saved += [weights, queries, *seen]
        ctx.save_for_backward(*saved)
        ctx.packing, ctx.scale, ctx.heads, ctx.shared = packing, scale, heads, shared
        return asks.gather(read).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        heads, shared, width = ctx.heads, ctx.shared, gradients[0].shape[-1]
        asks, holds = ctx.packing.map(heads, keys=False), ctx.packing.map(shared, keys=True)
        by_read = asks.spread(gradients[0].reshape(-1, width)).index_fill_(0, asks.empty, 0)
        by_own = torch.empty_like(by_read)
        by_keys, by_values = by_own.new_empty(2, len(holds.take), width)
        asked, held = ctx.packing.shares(heads, shared)
        filled = _by_group([by_read, by_own], *asked) + _by_group([by_keys, by_values], *held)
        saved = ctx.saved_tensors
        for group in zip(*(saved[place::4] for place in range(4)), *filled, strict=True):
            _gradients(ctx.scale, *group)
        rows = asks.gather(by_own), holds.sum(by_keys), holds.sum(by_values)
        return *(part.view(len(gradients[0]), -1, width) for part in rows), None, None, None


def _by_group(
    tensors: Sequence[Tensor], sizes: Sequence[int], products: Sequence[int]
) -> list[list[Tensor]]:
    """float[N, E] each -> for each its groups, float[C * K, positions, E]: heads that share keys
    are rows of one product."""
    return [
        [
            part.view(count, -1, part.shape[-1])
            for part, count in zip(tensor.split(sizes), products, strict=True)
        ]
        for tensor in tensors
    ]


class _Plain(torch.autograd.Function):
    """Attention by plain products: float[B, H, S, E], float[B, K, L, E] twice and what is added to
    scores, float[1 or B, 1, S, L], -> float[B, S, H, E]."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
    ) -> Tensor:
        products = key.shape[0] * key.shape[1]
        own, keys, values = (
            states.reshape(products, -1, states.shape[-1]) for states in (query, key, value)
        )
        weights = _weights(own, keys, bias, scale)
        ctx.save_for_backward(own, keys, values, weights)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape)
        return (weights @ values).view(query.shape).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own, keys, values, weights = ctx.saved_tensors
        by_read = gradients[0].transpose(1, 2).reshape(own.shape)
        by_own, by_keys, by_values = map(torch.empty_like, (own, keys, values))
        _gradients(ctx.scale, weights, own, keys, values, by_read, by_own, by_keys, by_values)
        query, key = ctx.shapes
        return by_own.view(query), by_keys.view(key), by_values.view(key), None, None


def _weights(own: Tensor, keys: Tensor, bias: Tensor, scale: float) -> Tensor:
    """What each head's query takes of each value: float[B * K, G * S, E], float[B * K, L, E] and
    float[1 or B, 1, S, L] -> float[B * K, G * S, L]. Of what is between the products only this is
    kept."""
    scores = torch.bmm(own, keys.transpose(1, 2))
    by_head = scores.view(len(bias), -1, *bias.shape[2:])
    return torch.add(bias, by_head, alpha=scale, out=by_head).softmax(-1).view(scores.shape)


def _gradients(
    scale: float,
    weights: Tensor,
    own: Tensor,
    keys: Tensor,
    values: Tensor,
    by_read: Tensor,
    by_own: Tensor,
    by_keys: Tensor,
    by_values: Tensor,
) -> None:
    """Fill the gradients by queries, keys and values from that by what was read of them."""
    torch.bmm(weights.transpose(1, 2), by_read, out=by_values)
    by_weights = torch.bmm(by_read, (values * scale).transpose(1, 2))  # the smallest to be scaled
    by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
    torch.bmm(by_scores, keys, out=by_own)
    torch.bmm(by_scores.transpose(1, 2), own, out=by_keys)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, or the same by plain products where that trains faster."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    usual = mask is None or mask.dtype == torch.bool
    if not (usual and key.shape[2] <= SHORT and _is_plain(query, key, value, options)):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is None:
        mask = _seen(query.shape[2], key.shape[2], None, query.device)
    bias, scale = _added(mask, query.dtype), _scale(query, options)
    return _Plain.apply(query, key, value, bias, scale), None  # pyright: ignore


def _is_plain(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether plain products can train it, and are faster."""
    if torch.compiler.is_compiling() or options.get("dropout"):
        return False
    same = query.dtype == key.dtype == value.dtype and key.shape == value.shape
    return same and query.device.type == "cpu" and query.requires_grad


def _scale(query: Tensor, options: Mapping[str, Any]) -> float:
    return options.get("scaling") or query.shape[-1] ** -0.5


def _seen(own: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """What each of the last positions sees of all, itself the last: bool[1, 1, own, seen]"""
    places = torch.arange(seen, device=device)
    behind = places[seen - own :, None] - places
    found = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return found[None, None]


def _bias(
    own: int, seen: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    return _added(_seen(own, seen, window, device), dtype)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where something is seen. Elsewhere what leaves numbers even where nothing is."""
    unseen = torch.finfo(dtype).min / 2
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, unseen)


def register() -> None:
    """Make the kernel known to transformers, masks included."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(KERNEL, attend)
    AttentionMaskInterface.register(KERNEL, _mask)


def _mask(
    *, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **options: Any
) -> Tensor | None:
    """transformers' `sdpa_mask`, which leaves the mask out where no position is padding. To see
    that, an accelerator would be waited for: it gets a mask wherever there may be padding."""
    from transformers.masking_utils import sdpa_mask

    readable = attention_mask is None or attention_mask.device.type == "cpu"
    return sdpa_mask(
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and readable,
        **options,
    )


def no_mask(embeds: Tensor) -> Tensor:
    """A mask that transformers takes as made already and that no other attention could use: a
    family that does not hand the Packing on fails instead of mixing conversations."""
    return embeds.new_zeros(1, 1, 0, 0, dtype=torch.bool)
