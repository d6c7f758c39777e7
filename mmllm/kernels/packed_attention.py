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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.kernels.pack_layout import PackLayout, causal_mask, mask_to_bias

ATTENTION_NAME = "sdpa_packed"
"""The name of this attention in transformers; without a PackLayout it is transformers' `sdpa`."""
MAX_MATH_KEYS = 256
"""Number of keys up to which plain matrix products have the faster gradient on a CPU; the fused
kernel is made for long rows."""
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
"""transformers' `layer_types` that packed attention can compute."""


def packed_sdpa_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pack_layout: PackLayout | None = None,
    retrieval: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention, by the signature of transformers' attention functions.

    Args:
        module: the attention layer of transformers.
        query: float[1, H, T, E] of a pack.
        key: likewise, with the heads of keys.
        value: likewise.
        attention_mask: only used without a layout.
        pack_layout: the segments of the pack; None computes transformers' `sdpa` of a padded batch
            float[B, H, S, E].
        retrieval: a cache that chooses what the queries read (mmllm.llm.memory).
        **options: `scaling`, `sliding_window` and others that transformers passes.

    Returns:
        float[1, T, H, E], and None in place of attention weights.
    """
    if retrieval is not None:
        key, value, attention_mask = retrieval.layers[module.layer_idx].retrieve(query)
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
