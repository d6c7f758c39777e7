"""One decoder layer for inference: views of a module's weights, and the fewest calls that compute
it. A step of one token is bound by the memory that holds the weights, and transformers' modules,
hooks and masks add a third to that on a CPU.

Legend: N positions, I input features, O output features, R rank of an adapter, D width, H heads
(queries, then keys, then values), E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.kernels.lora_linear import plain_adapter
from mmllm.kernels.prepacked_linear import tensor_versions
from mmllm.kernels.rms_norm import RMSNorm
from mmllm.kernels.rope import apply_rope

_SLOW_ROWS = range(7, 16)
"""Numbers of float32 rows whose product takes longer than that of 16, up to 1.5 times as long: MKL
on a CPU with AVX-512."""


def matmul(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """Compute x @ weight by the fastest product for N rows.

    Args:
        x: float[N, I].
        weight: float[I, O].
        residual: float[N, O], added to the product; None: nothing.

    Returns:
        float[N, O].
    """
    if len(x) == 1 and x.dtype == torch.bfloat16:  # a third faster than a matrix of one row
        row = torch.mv(weight.t(), x[0])[None]
        return row if residual is None else row + residual
    if len(x) in _SLOW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu":
        padded = F.pad(x, (0, 0, 0, _SLOW_ROWS.stop - len(x)))
        product = torch.mm(padded, weight)[: len(x)]
        return product if residual is None else product.add_(residual)
    return torch.mm(x, weight) if residual is None else torch.addmm(residual, x, weight)


@dataclass(frozen=True)
class InferenceLinear:
    """A linear layer and its LoRA adapter, if it has one: `weight` [I, O]; `down` [I, R], `up`
    [R, O] and their `scale`. All tensors are views of the module's."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 0.0

    @classmethod
    def of(cls, module: Any) -> InferenceLinear | None:
        """Read a module; None if it computes anything else."""
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
        """Merge the adapters and concatenate the outputs of several layers, all of which have a
        bias or none."""
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
        """Apply the layer: float[N, I] -> float[N, O], plus `residual` float[N, O] if given."""
        out = matmul(x, self.weight, residual)
        if self.bias is not None:
            out = out + self.bias
        if self.down is None or self.up is None:
            return out
        if self.down.dtype == x.dtype:
            return torch.addmm(out, torch.mm(x, self.down), self.up, alpha=self.scale)
        adapter = torch.mm(torch.mm(x.to(self.down.dtype), self.down), self.up)
        return (out + adapter * self.scale).to(out.dtype)


@dataclass(frozen=True)
class ParallelLinear:
    """Several linear layers of one input: float[N, I] -> float[N, sum of O]."""

    parts: tuple[InferenceLinear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class InferenceLayer:
    """Attention and gated MLP of one decoder layer, each behind a norm. `qkv_proj` gives the
    features of all heads: queries, keys, values."""

    input_norm: RMSNorm
    qkv_proj: InferenceLinear | ParallelLinear
    o_proj: InferenceLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    post_attention_norm: RMSNorm
    gate_proj: InferenceLinear
    up_proj: InferenceLinear
    down_proj: InferenceLinear
    activation: Callable[[Tensor], Tensor]
    heads: int
    kv_heads: int
    scale: float

    @classmethod
    def of(cls, module: Any) -> InferenceLayer | None:
        """Read one of transformers' layers; None if a linear layer of it computes anything else."""
        attention, mlp = module.self_attn, module.mlp
        linears = [InferenceLinear.of(getattr(attention, f"{name}_proj")) for name in "qkvo"]
        linears += [
            InferenceLinear.of(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")
        ]
        readable = [linear for linear in linears if linear is not None]
        if len(readable) < len(linears):
            return None
        *qkv, o_proj, gate_proj, up_proj, down_proj = readable
        q_norm, k_norm = (
            RMSNorm.of(getattr(attention, name)) if hasattr(attention, name) else None
            for name in ("q_norm", "k_norm")
        )
        return cls(
            input_norm=RMSNorm.of(module.input_layernorm),
            qkv_proj=_fused_qkv(attention, qkv) or ParallelLinear(tuple(qkv)),
            o_proj=o_proj,
            q_norm=q_norm,
            k_norm=k_norm,
            post_attention_norm=RMSNorm.of(module.post_attention_layernorm),
            gate_proj=gate_proj,
            up_proj=up_proj,
            down_proj=down_proj,
            activation=mlp.act_fn,
            heads=qkv[0].weight.shape[1] // attention.head_dim,
            kv_heads=qkv[1].weight.shape[1] // attention.head_dim,
            scale=attention.scaling,
        )

    def qkv(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute rotated queries, rotated keys, and values.

        Args:
            h: float[N, D], normalized hidden states.
            cos: the cosine table of `rope_cos_sin`.
            sin: the sine table.

        Returns:
            float[N, H, E] each; keys and values have fewer heads with grouped-query attention.
        """
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        heads = self.qkv_proj(h).view(len(h), sum(sizes), -1)
        q, k, v = heads.split(sizes, dim=1)
        if self.q_norm and self.k_norm:
            heads = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = apply_rope(heads[:, : sum(sizes[:2])], cos, sin).split(sizes[:2], dim=1)
        return q, k, v

    def add_attention(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Add the output projection to the residual stream, and normalize the sum for the MLP.

        Args:
            x: float[N, D], the residual stream.
            attended: float[N, H * E], the heads' outputs.

        Returns:
            The new residual stream and its normalization, float[N, D] each.
        """
        x = self.o_proj(attended, residual=x)
        return x, self.post_attention_norm(x)

    def add_mlp(self, x: Tensor, h: Tensor, next_norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """Add the MLP to the residual stream, and normalize the sum for what follows.

        Args:
            x: float[N, D], the residual stream.
            h: float[N, D], its normalization.
            next_norm: the norm of the next layer, or the last one.

        Returns:
            The new residual stream and its normalization, float[N, D] each.
        """
        x = self.down_proj(self.activation(self.gate_proj(h)) * self.up_proj(h), residual=x)
        return x, next_norm(x)


_FUSED_QKV: WeakKeyDictionary[nn.Module, tuple[Any, InferenceLinear]] = WeakKeyDictionary()
"""The fused layer of each attention module, and the versions of the weights it was made of."""


def _fused_qkv(attention: nn.Module, parts: list[InferenceLinear]) -> InferenceLinear | None:
    """Return queries, keys and values as one product, adapters merged: a copy of these weights,
    which is kept until they change. None for weights that train or that do not count their changes,
    and where merging would round (below float32) or would gain nothing (a GPU)."""
    weights = list(attention.parameters())
    for weight in weights:
        exact = weight.dtype == torch.float32 and weight.device.type == "cpu"
        if not exact or weight.requires_grad or weight.is_inference():
            return None
    if len({part.bias is None for part in parts}) > 1:
        return None
    version = tensor_versions(weights), [(part.down is None, part.scale) for part in parts]
    cached = _FUSED_QKV.get(attention)
    if cached is None or cached[0] != version:
        cached = version, InferenceLinear.concat_outputs(parts)
        _FUSED_QKV[attention] = cached
    return cached[1]
