"""The layers of a Llama-like model without what surrounds them: a step of one token is bound by the
memory that holds the weights, and a forward pass of transformers adds a third to that in modules,
hooks and masks on a CPU.

The weights are the modules' own, adapters included, and the arithmetic is theirs; whatever this
does not know (other families, hooks, quantised weights, other attention) runs as it did before.

Legend: B rows, W new positions, N = B * W, T all positions, D width, H heads, C channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.llm import packing

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Families of transformers whose layers are what `Stack` computes."""


@dataclass(frozen=True)
class _Linear:
    """A linear layer, perhaps with an adapter of peft's: `weight` [I, O]; `down` [I, R], `up`
    [R, O] and its `scale`. All are views."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 0.0

    @classmethod
    def of(cls, module: Any) -> _Linear | None:
        """None for a module that does something else."""
        if type(module) is nn.Linear:
            return cls(module.weight.t(), module.bias)
        if not hasattr(module, "lora_A") or type(module.base_layer) is not nn.Linear:
            return None
        base = module.base_layer
        (name,) = module.active_adapters if len(module.active_adapters) == 1 else ("",)
        plain = name in module.lora_A and not module.merged and not module.disable_adapters
        if not plain or name in module.lora_variant or module.training:
            return None
        down, up = module.lora_A[name], module.lora_B[name]
        if type(down) is not nn.Linear or up.bias is not None:
            return None
        scale = module.scaling[name]
        return cls(base.weight.t(), base.bias, down.weight.t(), up.weight.t(), scale)

    def __call__(self, x: Tensor) -> Tensor:
        """float[N, I] -> float[N, O]"""
        if len(x) == 1 and x.dtype == torch.bfloat16:  # a third faster than a matrix of one row
            out = torch.mv(self.weight.t(), x[0])[None]
        else:
            out = torch.mm(x, self.weight)
        if self.bias is not None:
            out = out + self.bias
        if self.down is None or self.up is None:
            return out
        if self.down.dtype == x.dtype:
            return torch.addmm(out, torch.mm(x, self.down), self.up, alpha=self.scale)
        added = torch.mm(torch.mm(x.to(self.down.dtype), self.down), self.up)
        return (out + added * self.scale).to(out.dtype)


@dataclass(frozen=True)
class _Norm:
    """Root mean square normalisation. `eps` is added to the mean square."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * torch.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


@dataclass(frozen=True)
class _Layer:
    """One layer: attention, then the gated network, each behind a norm."""

    norm: _Norm
    q: _Linear
    k: _Linear
    v: _Linear
    o: _Linear
    q_norm: _Norm | None
    k_norm: _Norm | None
    norm_after: _Norm
    gate: _Linear
    up: _Linear
    down: _Linear
    activation: Any
    channels: int
    scale: float


class Stack:
    """The layers of one model, from embeddings to the last hidden states."""

    def __init__(self, layers: list[_Layer], norm: _Norm, rotary: Any):
        self.layers = layers
        self.norm = norm
        self.rotary = rotary

    @classmethod
    def of(cls, decoder: Any) -> Stack | None:
        """Of the part of a transformers model below its head; None where it is not one of those
        that are known, or something hooks into it."""
        family = type(decoder).__name__.removesuffix("Model")
        if family not in _FAMILIES or decoder.config._attn_implementation != packing.KERNEL:
            return None
        if decoder.training or any(_is_hooked(module) for module in decoder.modules()):
            return None
        layers = [_layer(layer) for layer in decoder.layers[: decoder.config.num_hidden_layers]]
        known = [layer for layer in layers if layer is not None]
        if len(known) < len(layers):
            return None
        return cls(known, _norm(decoder.norm), decoder.rotary_emb)

    def __call__(self, x: Tensor, *, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """float[B, W, D] -> float[B, W, D]; `mask` bool[B, T], `positions` int[B, W], and a cache
        of T - W positions, which is extended."""
        rows, width, _ = x.shape
        cos, sin = (part[:, None] for part in self.rotary(x, positions))  # [B, 1, W, C]
        sin = torch.cat((-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]), dim=-1)
        known = cache.get_seq_length()
        seen = _seen(mask, width, known)
        causal = seen is None and width > 1
        x = x.reshape(rows * width, -1)
        for layer, held in zip(self.layers, cache.layers, strict=True):
            h = layer.norm(x)
            heads = (rows, width, -1, layer.channels)
            q, k, v = layer.q(h).view(heads), layer.k(h).view(heads), layer.v(h).view(heads)
            if layer.q_norm and layer.k_norm:
                q, k = layer.q_norm(q), layer.k_norm(k)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, W, C]
            keys, values = held.update(_rotated(k, cos, sin), v)
            read = F.scaled_dot_product_attention(
                _rotated(q, cos, sin),
                keys,
                values,
                attn_mask=seen,
                is_causal=causal,
                scale=layer.scale,
                enable_gqa=q.shape[1] != keys.shape[1],
            )
            x = x + layer.o(read.transpose(1, 2).reshape(rows * width, -1))
            h = layer.norm_after(x)
            x = x + layer.down(layer.activation(layer.gate(h)) * layer.up(h))
        return self.norm(x).view(rows, width, -1)


def _seen(mask: Tensor | None, width: int, known: int) -> Tensor | None:
    """What each new position attends to: bool[B, 1, W, T]; None where that is all before it, and
    nothing was before, or a single position is new."""
    if mask is None or bool(mask.all()):
        if width == 1 or known == 0:
            return None
        mask = torch.ones(1, known + width, dtype=torch.bool) if mask is None else mask
    order = torch.ones(width, known + width, dtype=torch.bool, device=mask.device).tril(known)
    return mask[:, None, None, :] & order


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of float[B, H, W, C]; the first half of `sin` is
    negative."""
    half, rest = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((rest, half), dim=-1), sin)


def _layer(module: Any) -> _Layer | None:
    """One of transformers' layers; None if it holds what is not known."""
    attention, network = module.self_attn, module.mlp
    linear = [_Linear.of(getattr(attention, f"{name}_proj")) for name in "qkvo"]
    linear += [_Linear.of(getattr(network, f"{name}_proj")) for name in ("gate", "up", "down")]
    known = [part for part in linear if part is not None]
    if len(known) < len(linear):
        return None
    q, k, v, o, gate, up, down = known
    q_norm, k_norm = (
        _norm(getattr(attention, name)) if hasattr(attention, name) else None
        for name in ("q_norm", "k_norm")
    )
    return _Layer(
        norm=_norm(module.input_layernorm),
        q=q,
        k=k,
        v=v,
        o=o,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_after=_norm(module.post_attention_layernorm),
        gate=gate,
        up=up,
        down=down,
        activation=network.act_fn,
        channels=attention.head_dim,
        scale=attention.scaling,
    )


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody (accelerate, FSDP, a user) put something around a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
