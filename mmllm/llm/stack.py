"""The layers of a Llama-like model without what surrounds them: a step of one token is bound by the
memory that holds the weights, and a forward pass of transformers adds a third to that in modules,
hooks and masks on a CPU.

The weights are the modules' own, adapters included, and the arithmetic is theirs; whatever this
does not know (other families, hooks, quantised weights, other attention) runs as it did before.

Legend: B rows, W new positions, N = B * W, T all positions, D width, H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.kernels import packed_attention as packing
from mmllm.kernels.devices import to_device
from mmllm.kernels.forward_hooks import ForwardHooks
from mmllm.kernels.lora_linear import plain_adapter
from mmllm.kernels.prepacked_linear import tensor_versions

SUPPORTED_MODEL_TYPES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Families of transformers whose layers are what `CachedDecoderStack` computes."""
_SLOW_ROWS = range(7, 16)
"""Rows of float32 whose product takes longer than that of 16, up to 1.5 times as long: MKL on a CPU
with AVX-512."""


@dataclass(frozen=True)
class InferenceLinear:
    """A linear layer, perhaps with an adapter of peft's: `weight` [I, O]; `down` [I, R], `up`
    [R, O] and its `scale`. All are views."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 0.0

    @classmethod
    def of(cls, module: Any) -> InferenceLinear | None:
        """None for a module that does something else."""
        if type(module) is nn.Linear:
            return cls(module.weight.t(), module.bias)
        base = getattr(module, "base_layer", None)
        if type(base) is nn.Linear and module.disable_adapters and not module.merged:
            return cls(base.weight.t(), base.bias)
        plain = None if module.training else plain_adapter(module)
        if plain is None:
            return None
        base, down, up, scale = plain
        return cls(base.weight.t(), base.bias, down.t(), up.t(), scale)

    @classmethod
    @torch.no_grad()
    def concat_outputs(cls, parts: Sequence[InferenceLinear]) -> InferenceLinear:
        """One layer that gives what all of these give, side by side. All have a bias, or none."""
        weights = [
            part.weight
            if part.down is None or part.up is None
            else torch.addmm(part.weight, part.down, part.up, alpha=part.scale)
            for part in parts
        ]
        biases = [part.bias for part in parts if part.bias is not None]
        weight = torch.cat([weight.t() for weight in weights]).t()
        return cls(weight, torch.cat(biases) if biases else None)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """float[N, I] -> float[N, O], added `residual` float[N, O] where that is given"""
        out = matmul(x, self.weight, residual)
        if self.bias is not None:
            out = out + self.bias
        if self.down is None or self.up is None:
            return out
        if self.down.dtype == x.dtype:
            return torch.addmm(out, torch.mm(x, self.down), self.up, alpha=self.scale)
        added = torch.mm(torch.mm(x.to(self.down.dtype), self.down), self.up)
        return (out + added * self.scale).to(out.dtype)


@dataclass(frozen=True)
class ParallelLinear:
    """Several linear layers that read the same: float[N, I] -> float[N, sum of O]."""

    parts: tuple[InferenceLinear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square normalisation. `eps` float[1, 1] is added to the mean square."""

    weight: Tensor
    eps: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """float[..., D] -> float[..., D], in float32 within."""
        exact = x.float()
        if len(x) == 1 and x.ndim == 2:  # torch makes two steps more of it
            square = torch.addmm(self.eps, exact, exact.t(), alpha=1 / x.shape[-1])
            return (exact * square.rsqrt_()).to(x.dtype) * self.weight
        mean = torch.linalg.vecdot(exact, exact)[..., None] / x.shape[-1]
        return (exact * (mean + self.eps[0]).rsqrt_()).to(x.dtype) * self.weight


@dataclass(frozen=True)
class InferenceLayer:
    """One layer: attention, then the gated network, each behind a norm. `qkv` gives the channels
    of all heads: those that ask, those of keys, those of values."""

    norm: RMSNorm
    qkv: InferenceLinear | ParallelLinear
    o: InferenceLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    norm_after: RMSNorm
    gate: InferenceLinear
    up: InferenceLinear
    down: InferenceLinear
    activation: Any
    heads: int
    kv_heads: int
    scale: float


@dataclass(frozen=True)
class ForwardRequest:
    """New positions of B rows: `embeds` float[B, W, D] and `positions` int[B, W]; the `cache` of
    what is before them, which they extend; `mask` bool[B, T] of all that is there then."""

    embeds: Tensor
    positions: Tensor
    mask: Tensor | None
    cache: Any


class CachedDecoderStack:
    """The layers of one model, from embeddings to the last hidden states."""

    def __init__(self, layers: list[InferenceLayer], norm: RMSNorm, rotary: Any):
        self.layers = layers
        self.norm = norm
        self.rotary = rotary

    @classmethod
    def build(cls, decoder: Any) -> CachedDecoderStack | None:
        """Of the part of a transformers model below its head; None where it is not one of those
        that are known, or something hooks into it."""
        if (
            not is_supported(decoder)
            or decoder.config._attn_implementation != packing.ATTENTION_NAME
        ):
            return None
        if decoder.training or ForwardHooks(decoder):
            return None
        layers = [_layer(layer) for layer in decoder.layers[: decoder.config.num_hidden_layers]]
        known = [layer for layer in layers if layer is not None]
        if len(known) < len(layers):
            return None
        return cls(known, _norm(decoder.norm), decoder.rotary_emb)

    def __call__(self, requests: Sequence[ForwardRequest]) -> list[Tensor]:
        """float[B, W, D] of each pass -> float[B, W, D]; their caches are extended. The weights are
        read once for all."""
        parts = [CachedAttention.of(new) for new in requests]
        x = _concat([new.embeds.flatten(0, 1) for new in requests])  # [N, D]
        positions = _concat([new.positions.flatten() for new in requests])
        cos, sin = rope_cos_sin(self.rotary, x, positions)
        for index, layer in enumerate(self.layers):
            sizes = (layer.heads, layer.kv_heads, layer.kv_heads)
            heads = layer.qkv(layer.norm(x)).view(len(x), sum(sizes), -1)
            q, k, v = heads.split(sizes, dim=1)
            if layer.q_norm and layer.k_norm:
                heads = torch.cat((layer.q_norm(q), layer.k_norm(k)), dim=1)
            q, k = apply_rope(heads[:, : sum(sizes[:2])], cos, sin).split(sizes[:2], dim=1)
            qkv = [part.split([part.size for part in parts]) for part in (q, k, v)]
            read = _concat(
                [part.read(layer, index, *its) for part, *its in zip(parts, *qkv, strict=True)]
            )
            x = layer.o(read, residual=x)
            h = layer.norm_after(x)
            x = layer.down(layer.activation(layer.gate(h)) * layer.up(h), residual=x)
        states = self.norm(x).split([part.size for part in parts])
        return [its.view(new.embeds.shape) for new, its in zip(requests, states, strict=True)]


@dataclass(frozen=True)
class CachedAttention:
    """The attention of one request. `seen`: see `visible_mask`; `causal`: nothing was before, and
    there is no padding; `single_query`: single positions that plain products read faster."""

    rows: int
    width: int
    cache: Any
    seen: Tensor | None
    causal: bool
    single_query: bool

    @classmethod
    def of(cls, new: ForwardRequest) -> CachedAttention:
        rows, width, _ = new.embeds.shape
        seen = visible_mask(new.mask, width, new.cache.get_seq_length(), new.embeds.device)
        exact = new.embeds.dtype == torch.float32 and new.embeds.device.type == "cpu"
        alone = width == 1 and seen is None
        return cls(rows, width, new.cache, seen, seen is None and width > 1, alone and exact)

    @property
    def size(self) -> int:
        return self.rows * self.width

    def read(self, layer: InferenceLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """float[B * W, H, C], float[B * W, H', C] twice -> float[B * W, H * C]; layer `index` of
        the cache is extended."""
        q, k, v = (
            heads.view(self.rows, self.width, *heads.shape[1:]).transpose(1, 2)
            for heads in (q, k, v)
        )  # [B, H, W, C]
        keys, values = self.cache.layers[index].update(k, v)
        if self.single_query:
            return _single_query_attention(q, keys, values, layer.scale).view(self.size, -1)
        read = _sdpa(q, keys, values, self.seen, self.causal, layer.scale)
        return read.transpose(1, 2).reshape(self.size, -1)


def is_supported(decoder: Any) -> bool:
    """Whether the part of a model below its head is one of `SUPPORTED_MODEL_TYPES`, in
    transformers' own modules (linear layers may be others): nobody has put one of theirs in."""
    family = type(decoder).__name__.removesuffix("Model")
    if family not in SUPPORTED_MODEL_TYPES:
        return False
    kinds = {
        "self_attn": "Attention",
        "mlp": "MLP",
        "input_layernorm": "RMSNorm",
        "post_attention_layernorm": "RMSNorm",
    }
    parts = [(decoder.norm, "RMSNorm"), (decoder.rotary_emb, "RotaryEmbedding")]
    for layer in decoder.layers:
        parts.append((layer, "DecoderLayer"))
        parts += [(getattr(layer, name, None), kind) for name, kind in kinds.items()]
    return all(type(part).__name__ == family + kind for part, kind in parts)


def _concat(parts: Sequence[Tensor]) -> Tensor:
    """All of them, one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def matmul(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """float[N, I], float[I, O] -> float[N, O], added `residual` float[N, O] where that is given."""
    if len(x) == 1 and x.dtype == torch.bfloat16:  # a third faster than a matrix of one row
        row = torch.mv(weight.t(), x[0])[None]
        return row if residual is None else row + residual
    if len(x) in _SLOW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu":
        padded = F.pad(x, (0, 0, 0, _SLOW_ROWS.stop - len(x)))
        read = torch.mm(padded, weight)[: len(x)]
        return read if residual is None else read.add_(residual)
    return torch.mm(x, weight) if residual is None else torch.addmm(residual, x, weight)


def visible_mask(
    mask: Tensor | None, width: int, known: int, device: torch.device
) -> Tensor | None:
    """What each new position attends to: bool[B, 1, W, T]; None where that is all before it, and
    nothing was before, or a single position is new."""
    padded = mask is not None and not bool(mask.all())
    if not padded and (width == 1 or known == 0):
        return None
    order = torch.ones(width, known + width, dtype=torch.bool, device=device).tril(known)
    if mask is None or not padded:
        return order[None, None]
    # Padding sees itself: kernels differ in what attention over nothing gives.
    return (to_device(mask, device)[:, None, None, :] & order) | order.triu(known)


def _sdpa(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The fused kernel: float[B, H, W, C], float[B, H', T, C] twice -> float[B, H, W, C]. On
    accelerators its fast forms share keys between heads only where there is no mask, and on MPS
    never: there a single position is read as rows of one head, and else keys are repeated."""
    shape, groups = q.shape, q.shape[1] // keys.shape[1]
    shares = q.device.type == "cpu" or (q.device.type == "cuda" and seen is None)
    if groups > 1 and not shares:
        if shape[2] == 1:
            q = q.reshape(len(q), keys.shape[1], groups, -1)
        else:
            keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    read = F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=seen,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )
    return read.reshape(shape)


def _single_query_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """What single positions read of all before them, in a third of the fused kernel's time:
    float[B, H, 1, C], float[B, H', T, C] twice -> float[B, H, C]"""
    rows, groups = len(q), keys.shape[1]
    q = q.reshape(rows * groups, -1, q.shape[-1])
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    scores = torch.baddbmm(q.new_zeros(()), q, keys.transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(rows, -1, values.shape[-1])


def rope_cos_sin(rotary: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What `apply_rope` takes for rows float[N, D] at int[N], of a model's own table:
    float[N, 1, C] twice."""
    cos, sin = (part[0, :, None] for part in rotary(x[None], positions[None]))
    half, rest = sin.chunk(2, dim=-1)
    return cos, torch.cat((-half, rest), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, way: int = 1) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of float[N, H, C], backwards where `way` is -1;
    the first half of `sin` is negative."""
    half, rest = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((rest, half), dim=-1), sin, value=way)


def _layer(module: Any) -> InferenceLayer | None:
    """One of transformers' layers; None if it holds what is not known."""
    attention, network = module.self_attn, module.mlp
    linear = [InferenceLinear.of(getattr(attention, f"{name}_proj")) for name in "qkvo"]
    linear += [
        InferenceLinear.of(getattr(network, f"{name}_proj")) for name in ("gate", "up", "down")
    ]
    known = [part for part in linear if part is not None]
    if len(known) < len(linear):
        return None
    *qkv, o, gate, up, down = known
    q_norm, k_norm = (
        _norm(getattr(attention, name)) if hasattr(attention, name) else None
        for name in ("q_norm", "k_norm")
    )
    channels = attention.head_dim
    return InferenceLayer(
        norm=_norm(module.input_layernorm),
        qkv=_fused_qkv(attention, qkv) or ParallelLinear(tuple(qkv)),
        o=o,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_after=_norm(module.post_attention_layernorm),
        gate=gate,
        up=up,
        down=down,
        activation=network.act_fn,
        heads=qkv[0].weight.shape[1] // channels,
        kv_heads=qkv[1].weight.shape[1] // channels,
        scale=attention.scaling,
    )


_FUSED_QKV: WeakKeyDictionary[nn.Module, tuple[Any, InferenceLinear]] = WeakKeyDictionary()
"""One layer in place of three, by attention, and the state of what it was made of."""


def _fused_qkv(attention: nn.Module, parts: list[InferenceLinear]) -> InferenceLinear | None:
    """Queries, keys and values as one product, adapters merged, in a copy of these weights; kept
    until they change. None for weights that train or do not tell of their changes, and where
    merging would round (below float32) or would gain nothing (a GPU)."""
    made_of = list(attention.parameters())
    for weight in made_of:
        odd = weight.dtype != torch.float32 or weight.device.type != "cpu"
        if odd or weight.requires_grad or weight.is_inference():
            return None
    if len({part.bias is None for part in parts}) > 1:
        return None
    state = tensor_versions(made_of), [(part.down is None, part.scale) for part in parts]
    kept = _FUSED_QKV.get(attention)
    if kept is None or kept[0] != state:
        kept = state, InferenceLinear.concat_outputs(parts)
        _FUSED_QKV[attention] = kept
    return kept[1]


def _norm(module: Any) -> RMSNorm:
    eps = torch.full((1, 1), module.variance_epsilon, device=module.weight.device)
    return RMSNorm(module.weight, eps)
