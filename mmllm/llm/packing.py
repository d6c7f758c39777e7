"""Attention over sequences that are packed into one row, without a T x T mask.

Linear layers process the pack as it is, without padding. For attention alone each sequence becomes
a row of its own, whose keys start with the prefix that all sequences share (a system prompt, say)
and that is in the pack once; sequences of similar length form a group. Time and memory are those of
the sequences one by one.

Legend: T positions of the pack, C sequences of a group, P positions of the prefix that they attend
to, S positions of the group's longest sequence after the prefix, L = P + S; N rows of all groups:
C * S summed over groups for queries, C * L for keys; H heads, K key-value heads, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmllm.precision import to_device

ATTENTION_NAME = "sdpa_packed"
"""The name of this attention in transformers; without a PackLayout it is transformers' `sdpa`."""
MAX_MATH_KEYS = 256
"""Number of keys up to which plain matrix products have the faster gradient on a CPU; the fused
kernel is made for long rows."""
GROUP_OVERHEAD = 20_000
"""What one group more costs on a CPU, as the number of query-key pairs that take the same time."""
LENGTH_MULTIPLE = 4
"""L is rounded up to a multiple of it: products of odd widths take a fifth longer on a CPU."""
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
"""transformers' `layer_types` that packed attention can compute."""


@dataclass(frozen=True, eq=False)
class PackGroup:
    """C sequences of similar length.

    Args:
        prefix_len: P, the positions of the prefix that they attend to.
        positions: int[C, S], where their tokens are in the pack; anything where not `valid`.
        valid: bool[C, S], False behind the end of a shorter sequence.
    """

    prefix_len: int
    positions: Tensor
    valid: Tensor

    @property
    def num_sequences(self) -> int:
        """C"""
        return len(self.positions)

    @property
    def num_queries(self) -> int:
        """S"""
        return self.positions.shape[1]

    @property
    def num_keys(self) -> int:
        """L"""
        return self.prefix_len + self.num_queries


@dataclass(frozen=True)
class RowIndex:
    """The mapping between T rows of the pack and N rows of the groups. With heads, each row is that
    of one head.

    Args:
        to_groups: int[N], the pack's row that each row of the groups holds.
        to_pack: int[T], a row of the groups that holds each row of the pack.
        padding: The rows of the groups that hold none.
        prefix_copies: int[C, P] over all groups, the rows that hold a copy of the prefix.
    """

    to_groups: Tensor
    to_pack: Tensor
    padding: Tensor
    prefix_copies: Tensor

    def scatter(self, rows: Tensor) -> Tensor:
        """Copy the pack's rows to the groups: float[T, E] -> float[N, E], padding undefined."""
        return rows.index_select(0, self.to_groups)

    def gather(self, rows: Tensor) -> Tensor:
        """Copy the groups' rows back to the pack: float[N, E] -> float[T, E]"""
        return rows.index_select(0, self.to_pack)

    def gather_sum(self, rows: Tensor) -> Tensor:
        """Sum all copies of each row of the pack, the gradient of `scatter`: float[N, E] ->
        float[T, E]"""
        total = self.gather(rows)
        if prefix_len := self.prefix_copies.shape[1]:
            copies = rows.index_select(0, self.prefix_copies.flatten())
            total[:prefix_len] += copies.view(*self.prefix_copies.shape, -1).sum(0)
        return total


GroupSplit = tuple[list[int], list[int]]
"""The number of rows of each group, and the number of batched matrix products that they make: one
for each sequence and key-value head."""


class PackLayout:
    """Which position of a pack belongs to which sequence, with the index tables, masks and biases
    of its groups, which all layers of one forward pass share.

    Args:
        groups: Groups of sequences; a shared prefix is a group of its own.
        device: Where the tables are.
    """

    def __init__(self, groups: Sequence[PackGroup], device: torch.device):
        self.groups = tuple(groups)
        self.device = device
        self._cache: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def build(cls, seq_lens: Sequence[int], prefix_len: int, device: torch.device) -> PackLayout:
        """Group the sequences of a pack by length, without waiting for the device.

        Args:
            seq_lens: The length of each sequence, in the pack's order, without the prefix.
            prefix_len: Length of the prefix that all of them share, at the start of the pack.
            device: The device of the hidden states.
        """
        order = sorted(range(len(seq_lens)), key=lambda index: -seq_lens[index])
        lengths = torch.tensor(seq_lens)
        starts = prefix_len + lengths.cumsum(0) - lengths
        groups = []
        if prefix_len:
            groups.append(_build_group(torch.tensor([0]), torch.tensor([prefix_len]), 0))
        for size in group_sizes([seq_lens[index] for index in order], prefix_len, device):
            members, order = torch.tensor(order[:size]), order[size:]
            groups.append(_build_group(starts[members], lengths[members], prefix_len))
        return cls(groups, device)

    def row_index(self, heads: int, *, keys: bool) -> RowIndex:
        """Return the mapping for rows of `heads` heads: int[T * heads] in the pack; in the groups,
        by head, those of keys [C, heads, L] or of queries [C, heads, S]."""
        return self._cached(_build_row_index, self.groups, heads, keys, self.device)

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """Return what each position of a group attends to, bool[1, 1, S, L]; None if that is plain
        causal attention."""
        group = self.groups[index]
        if group.prefix_len == 0 and (window is None or group.num_queries <= window):
            return None
        return self._cached(causal_mask, group.num_queries, group.num_keys, window, self.device)

    def bias(self, index: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the same as an additive bias of scores: float[1, 1, S, L]."""
        group = self.groups[index]
        return self._cached(
            _causal_bias, group.num_queries, group.num_keys, window, self.device, dtype
        )

    def splits(self, heads: int, kv_heads: int) -> tuple[GroupSplit, GroupSplit]:
        """Return how rows of queries and rows of keys are split into groups."""
        return self._cached(_build_splits, self.groups, heads, kv_heads)

    def _cached(self, build: Callable[..., Any], *args: Any) -> Any:
        """Return build(*args), computed once for all layers."""
        if (build, *args) not in self._cache:
            self._cache[build, *args] = build(*args)
        return self._cache[build, *args]


def group_sizes(lengths: Sequence[int], prefix_len: int, device: torch.device) -> list[int]:
    """Split sequences into groups with the least padding, where a group is worth its own calls.

    Args:
        lengths: Of the sequences without the prefix, the longest first.
        prefix_len: Length of the shared prefix.
        device: An accelerator, whose calls cost more than padding, gets one group.

    Returns:
        The number of sequences of each group, in the order of `lengths`.
    """
    if device.type != "cpu":
        return [len(lengths)]
    best = [(0, 0)]  # for the first n sequences: (cost, size of the last group)
    for stop in range(1, len(lengths) + 1):
        best.append(
            min(
                (
                    best[start][0]
                    + (stop - start) * lengths[start] * (prefix_len + lengths[start])
                    + GROUP_OVERHEAD,
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


def _build_group(starts: Tensor, lengths: Tensor, prefix_len: int) -> PackGroup:
    """Make the group of sequences that start at int[C] with int[C] positions, the longest first."""
    num_keys = -(-(prefix_len + int(lengths[0])) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    columns = torch.arange(num_keys - prefix_len)
    valid = columns < lengths[:, None]
    return PackGroup(prefix_len, torch.where(valid, starts[:, None] + columns, 0), valid)


def _build_row_index(
    groups: tuple[PackGroup, ...], heads: int, keys: bool, device: torch.device
) -> RowIndex:
    """Build the tables of `PackLayout.row_index` on the CPU and copy them to the device."""
    positions, valids, prefix_copies, offset = [], [], [], 0
    head = torch.arange(heads)[:, None]
    for group in groups:
        position, valid = group.positions, group.valid
        if keys:
            prefix = torch.arange(group.prefix_len).expand(group.num_sequences, -1)
            position = torch.cat([prefix, position], dim=1)
            valid = torch.cat([torch.zeros_like(prefix, dtype=torch.bool), valid], dim=1)
            num_rows = group.num_sequences * heads * group.num_keys
            if group.prefix_len:
                rows = (offset + torch.arange(num_rows)).view(group.num_sequences, heads, -1)
                rows = rows[:, :, : group.prefix_len]
                prefix_copies.append(rows.transpose(1, 2).flatten(1))
            offset += num_rows
        positions.append((position[:, None] * heads + head).flatten())
        valids.append(valid[:, None].expand(-1, heads, -1).flatten())
    to_groups, valid = torch.cat(positions), torch.cat(valids)
    to_pack = torch.empty(int(valid.sum()), dtype=torch.long)
    to_pack[to_groups[valid]] = valid.nonzero().flatten()
    copies = torch.cat(prefix_copies) if prefix_copies else torch.empty(0, 0, dtype=torch.long)
    tables = to_groups, to_pack, (~valid).nonzero().flatten(), copies
    return RowIndex(*(to_device(table, device) for table in tables))


def _build_splits(
    groups: tuple[PackGroup, ...], heads: int, kv_heads: int
) -> tuple[GroupSplit, GroupSplit]:
    products = [group.num_sequences * kv_heads for group in groups]
    query_rows = [group.num_sequences * heads * group.num_queries for group in groups]
    key_rows = [group.num_sequences * kv_heads * group.num_keys for group in groups]
    return (query_rows, products), (key_rows, products)


def causal_mask(
    num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> Tensor:
    """Return which of all positions each of the last ones attends to: itself and those before it,
    at most `window` of them. bool[1, 1, num_queries, num_keys]"""
    positions = torch.arange(num_keys, device=device)
    distance = positions[num_keys - num_queries :, None] - positions
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return mask[None, None]


def mask_to_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where the mask is True, and elsewhere a number so low that its softmax is 0, and
    still finite in a row that is masked wholly."""
    lowest = torch.finfo(dtype).min / 2
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)


def _causal_bias(
    num_queries: int, num_keys: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    return mask_to_bias(causal_mask(num_queries, num_keys, window, device), dtype)


def packed_sdpa_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pack_layout: PackLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query, key and value float[1, H, T, E] ->
    float[1, T, H, E]. Without a layout it is transformers' `sdpa` for float[B, H, S, E]."""
    if pack_layout is None:
        return _sdpa_forward(module, query, key, value, attention_mask, **options)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return packed_attention(module, q, k, v, pack_layout, **options)[None], None


@torch.compiler.disable()  # the shapes differ from batch to batch
def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, **options: Any
) -> Tensor:
    """Compute causal attention within each sequence of a pack and to the shared prefix.

    Args:
        module: transformers' attention module.
        query: float[T, H, E].
        key: float[T, K, E].
        value: float[T, K, E]; its E may differ from that of the keys.
        layout: The pack's.
        **options: `scaling`, `dropout`, `sliding_window`, as transformers passes them.

    Returns:
        float[T, H, E].
    """
    window = options.get("sliding_window")
    states = query, key, value
    is_short = max(group.num_keys for group in layout.groups) <= MAX_MATH_KEYS
    if is_short and _prefers_math(query, key, value, options):
        scale = _attention_scale(query, options)
        return MathPackedAttention.apply(*states, layout, window, scale)  # pyright: ignore
    rows = [
        PackToGroups.apply(part, layout, is_key)  # pyright: ignore
        for part, is_key in zip(states, (False, True, True), strict=True)
    ]
    query_rows = [group.num_sequences * group.num_queries for group in layout.groups]
    key_rows = [group.num_sequences * group.num_keys for group in layout.groups]
    by_group = [
        row.split(sizes) for row, sizes in zip(rows, (query_rows, key_rows, key_rows), strict=True)
    ]
    outputs = []
    for index, (group, *parts) in enumerate(zip(layout.groups, *by_group, strict=True)):
        q, k, v = (part.unflatten(0, (group.num_sequences, -1)).transpose(1, 2) for part in parts)
        output, _ = _sdpa_forward(module, q, k, v, layout.mask(index, window), **options)
        outputs.append(output.flatten(0, 1))
    return GroupsToPack.apply(torch.cat(outputs), layout)  # pyright: ignore


class PackToGroups(torch.autograd.Function):
    """Copy the pack's rows float[T, H, E] to the groups' rows float[N, H, E]. The backward pass has
    an index of its own, because `index_add_` is many times slower."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layout: PackLayout, keys: bool) -> Tensor:  # pyright: ignore
        ctx.layout, ctx.keys = layout, keys
        return layout.row_index(1, keys=keys).scatter(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.keys:
            return ctx.layout.row_index(1, keys=False).gather(grads[0]), None, None
        total = ctx.layout.row_index(1, keys=True).gather_sum(grads[0].flatten(1))
        return total.view(-1, *grads[0].shape[1:]), None, None


class GroupsToPack(torch.autograd.Function):
    """Copy the groups' rows float[N, H, E] back to the pack: float[T, H, E]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: PackLayout) -> Tensor:  # pyright: ignore
        ctx.layout = layout
        return layout.row_index(1, keys=False).gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index = ctx.layout.row_index(1, keys=False)
        return index.scatter(grads[0]).index_fill_(0, index.padding, 0), None


class MathPackedAttention(torch.autograd.Function):
    """Packed attention by plain matrix products: float[T, H, E], float[T, K, E] twice ->
    float[T, H, E]. The groups' rows are ordered by head, so that no product needs a transpose or a
    copy."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackLayout,
        window: int | None,
        scale: float,
    ) -> Tensor:
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[2]
        query_index = layout.row_index(heads, keys=False)
        key_index = layout.row_index(kv_heads, keys=True)
        query_rows = query_index.scatter(query.reshape(-1, width))
        key_rows, value_rows = (
            key_index.scatter(states.reshape(-1, width)) for states in (key, value)
        )
        output_rows = torch.empty_like(query_rows)
        query_split, key_split = layout.splits(heads, kv_heads)
        by_group = [
            *_split_groups([query_rows, output_rows], *query_split),
            *_split_groups([key_rows, value_rows], *key_split),
        ]
        saved = []
        for index, (q, output, k, v) in enumerate(zip(*by_group, strict=True)):
            weights = _attention_weights(q, k, layout.bias(index, window, q.dtype), scale)
            torch.bmm(weights, v, out=output)
            saved += [weights, q, k, v]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scale, ctx.heads, ctx.kv_heads = layout, scale, heads, kv_heads
        return query_index.gather(output_rows).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads, kv_heads, width = ctx.heads, ctx.kv_heads, grads[0].shape[-1]
        query_index = ctx.layout.row_index(heads, keys=False)
        key_index = ctx.layout.row_index(kv_heads, keys=True)
        output_grad = query_index.scatter(grads[0].reshape(-1, width))
        output_grad.index_fill_(0, query_index.padding, 0)
        query_grad = torch.empty_like(output_grad)
        key_grad, value_grad = query_grad.new_empty(2, len(key_index.to_groups), width)
        query_split, key_split = ctx.layout.splits(heads, kv_heads)
        by_group = [
            *_split_groups([output_grad, query_grad], *query_split),
            *_split_groups([key_grad, value_grad], *key_split),
        ]
        saved = ctx.saved_tensors
        for group in zip(*(saved[place::4] for place in range(4)), *by_group, strict=True):
            _attention_backward(ctx.scale, *group)
        rows = (
            query_index.gather(query_grad),
            key_index.gather_sum(key_grad),
            key_index.gather_sum(value_grad),
        )
        return *(part.view(len(grads[0]), -1, width) for part in rows), None, None, None


class MathAttention(torch.autograd.Function):
    """Attention by plain matrix products: float[B, H, S, E], float[B, K, L, E] twice and an
    additive bias float[1 or B, 1, S, L] -> float[B, S, H, E]."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
    ) -> Tensor:
        products = key.shape[0] * key.shape[1]
        q, k, v = (states.reshape(products, -1, states.shape[-1]) for states in (query, key, value))
        weights = _attention_weights(q, k, bias, scale)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape)
        return (weights @ v).view(query.shape).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        output_grad = grads[0].transpose(1, 2).reshape(q.shape)
        q_grad, k_grad, v_grad = map(torch.empty_like, (q, k, v))
        _attention_backward(ctx.scale, weights, q, k, v, output_grad, q_grad, k_grad, v_grad)
        query_shape, key_shape = ctx.shapes
        return q_grad.view(query_shape), k_grad.view(key_shape), v_grad.view(key_shape), None, None


def _split_groups(
    tensors: Sequence[Tensor], sizes: Sequence[int], products: Sequence[int]
) -> list[list[Tensor]]:
    """Split float[N, E] each into groups float[C * K, positions, E]: heads that share keys are rows
    of one product."""
    return [
        [
            part.view(num_products, -1, part.shape[-1])
            for part, num_products in zip(tensor.split(sizes), products, strict=True)
        ]
        for tensor in tensors
    ]


def _attention_weights(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Compute softmax(query @ key.T * scale + bias), the only intermediate that is kept:
    float[B * K, G * S, E], float[B * K, L, E], float[1 or B, 1, S, L] -> float[B * K, G * S, L]"""
    scores = torch.bmm(query, key.transpose(1, 2))
    by_head = scores.view(len(bias), -1, *bias.shape[2:])
    return torch.add(bias, by_head, alpha=scale, out=by_head).softmax(-1).view(scores.shape)


def _attention_backward(
    scale: float,
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output_grad: Tensor,
    query_grad: Tensor,
    key_grad: Tensor,
    value_grad: Tensor,
) -> None:
    """Fill the gradients of queries, keys and values, given that of the output."""
    torch.bmm(weights.transpose(1, 2), output_grad, out=value_grad)
    weights_grad = torch.bmm(output_grad, (value * scale).transpose(1, 2))  # scale the smallest
    scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
    torch.bmm(scores_grad, key, out=query_grad)
    torch.bmm(scores_grad.transpose(1, 2), query, out=key_grad)


def _sdpa_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Call transformers' `sdpa`, or MathAttention where that trains faster."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_bool = mask is None or mask.dtype == torch.bool
    is_short = key.shape[2] <= MAX_MATH_KEYS
    if not (is_bool and is_short and _prefers_math(query, key, value, options)):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is None:
        mask = causal_mask(query.shape[2], key.shape[2], None, query.device)
    bias, scale = mask_to_bias(mask, query.dtype), _attention_scale(query, options)
    return MathAttention.apply(query, key, value, bias, scale), None  # pyright: ignore


def _prefers_math(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether plain matrix products can compute the gradient, and faster, if the rows are short."""
    if torch.compiler.is_compiling() or options.get("dropout"):
        return False
    same = query.dtype == key.dtype == value.dtype and key.shape == value.shape
    return same and query.device.type == "cpu" and query.requires_grad


def _attention_scale(query: Tensor, options: Mapping[str, Any]) -> float:
    return options.get("scaling") or query.shape[-1] ** -0.5


def register_attention() -> None:
    """Register this attention and its masks with transformers as `ATTENTION_NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, packed_sdpa_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _sdpa_mask)


def _sdpa_mask(
    *, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **options: Any
) -> Tensor | None:
    """Call transformers' `sdpa_mask`, which leaves the mask out where no position is padding.
    That test would wait for an accelerator, which therefore gets a mask wherever there may be
    padding."""
    from transformers.masking_utils import sdpa_mask

    is_readable = attention_mask is None or attention_mask.device.type == "cpu"
    return sdpa_mask(
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and is_readable,
        **options,
    )


def placeholder_mask(embeds: Tensor) -> Tensor:
    """Return a mask that transformers passes on as it is and that no other attention can use: a
    family that does not hand the PackLayout on fails, and does not mix sequences."""
    return embeds.new_zeros(1, 1, 0, 0, dtype=torch.bool)
