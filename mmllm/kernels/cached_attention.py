"""Attention of new positions to a key-value cache, for several requests at once.

Legend: B rows, W new positions of each, T all positions, H heads, K key-value heads, E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.kernels.devices import to_device
from mmllm.kernels.inference_layer import InferenceLayer
from mmllm.tokens import Sources


@dataclass(frozen=True)
class ForwardRequest:
    """New positions of B rows and the cache that they extend.

    Args:
        embeds: float[B, W, D].
        positions: int[B, W].
        mask: bool[B, T], True for tokens and False for padding, those in the cache included; best
            on the CPU. None: no padding.
        cache: The key-value cache of all positions before the new ones.
        sources: What the embeddings stand for.
    """

    embeds: Tensor
    positions: Tensor
    mask: Tensor | None
    cache: Any
    sources: Sources | None = None

    @property
    def options(self) -> dict[str, Any]:
        """All but the embeddings, as the forward pass of a model takes them."""
        names = ("mask", "positions", "cache", "sources")
        return {name: getattr(self, name) for name in names}


class CachedAttention:
    """The attention of all requests of one forward pass, whose positions stand one behind the other
    in one row of N positions."""

    def __init__(self, requests: Sequence[ForwardRequest]):
        self.requests = [_RequestAttention.of(request) for request in requests]
        self.sizes = [request.num_positions for request in self.requests]

    def __call__(
        self, index: int, layer: InferenceLayer, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Extend layer `index` of the caches and attend to them: float[N, H, E], float[N, K, E]
        twice -> float[N, H * E]"""
        by_request = zip(
            self.requests, *(part.split(self.sizes) for part in (q, k, v)), strict=True
        )
        return concat([request(index, layer.scale, *qkv) for request, *qkv in by_request])


@dataclass(frozen=True)
class _RequestAttention:
    """The attention of one request: `mask` of `visible_mask`; `is_causal`: nothing is cached, and
    there is no padding; `single_query`: plain products are faster for one position a row."""

    rows: int
    width: int
    cache: Any
    mask: Tensor | None
    is_causal: bool
    single_query: bool

    @classmethod
    def of(cls, request: ForwardRequest) -> _RequestAttention:
        embeds, cache = request.embeds, request.cache
        rows, width, _ = embeds.shape
        mask = visible_mask(request.mask, width, cache.get_seq_length(), embeds.device)
        is_exact_cpu = embeds.dtype == torch.float32 and embeds.device.type == "cpu"
        single_query = width == 1 and mask is None and is_exact_cpu
        return cls(rows, width, cache, mask, mask is None and width > 1, single_query)

    @property
    def num_positions(self) -> int:
        """B * W"""
        return self.rows * self.width

    def __call__(self, index: int, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """float[B * W, H, E], float[B * W, K, E] twice -> float[B * W, H * E]"""
        q, k, v = (
            heads.view(self.rows, self.width, *heads.shape[1:]).transpose(1, 2)
            for heads in (q, k, v)
        )  # [B, H, W, E]
        keys, values = self.cache.layers[index].update(k, v)
        mask, is_causal = self.mask, self.is_causal
        if not self.cache.reads_all:
            keys, values, mask = self.cache.layers[index].retrieve(q)
            is_causal = False
        if self.single_query and mask is None:
            return _single_query_attention(q, keys, values, scale).view(self.num_positions, -1)
        attended = _sdpa(q, keys, values, mask, is_causal, scale)
        return attended.transpose(1, 2).reshape(self.num_positions, -1)


def visible_mask(
    mask: Tensor | None, width: int, cached: int, device: torch.device
) -> Tensor | None:
    """Compute what each new position attends to.

    Args:
        mask: bool[B, T] as in `ForwardRequest`.
        width: W.
        cached: Positions in the cache, T - W.
        device: Where the result is needed.

    Returns:
        bool[B, 1, W, T]; None without padding if that is plain causal attention over nothing
        cached, or a single new position, which attends to all.
    """
    has_padding = mask is not None and not bool(mask.all())
    if not has_padding and (width == 1 or cached == 0):
        return None
    causal = torch.ones(width, cached + width, dtype=torch.bool, device=device).tril(cached)
    if mask is None or not has_padding:
        return causal[None, None]
    # Padding attends to itself: kernels differ in what attention to nothing gives.
    return (to_device(mask, device)[:, None, None, :] & causal) | causal.triu(cached)


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along the first axis, without a copy if there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _sdpa(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Attend by the fused kernel: float[B, H, W, E], float[B, K, T, E] twice -> float[B, H, W, E].

    On accelerators its fast forms share keys between heads only without a mask, and on MPS never:
    there a single position is computed as K heads of H / K queries each, and else keys are
    repeated.
    """
    shape, groups = q.shape, q.shape[1] // keys.shape[1]
    shares_keys = q.device.type == "cpu" or (q.device.type == "cuda" and mask is None)
    if groups > 1 and not shares_keys:
        if shape[2] == 1:
            q = q.reshape(len(q), keys.shape[1], groups, -1)
        else:
            keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    attended = F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )
    return attended.reshape(shape)


def _single_query_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend from one position a row to all before it, in a third of the fused kernel's time:
    float[B, H, 1, E], float[B, K, T, E] twice -> float[B, H, E]"""
    rows, kv_heads = len(q), keys.shape[1]
    q = q.reshape(rows * kv_heads, -1, q.shape[-1])
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    scores = torch.baddbmm(q.new_zeros(()), q, keys.transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(rows, -1, values.shape[-1])
