"""The layers of a Llama-like model over a pack, trained on a CPU in fewer passes over memory.

transformers' layers read and write a pack several times for a norm, once more for each sum, and
have every frozen weight laid out anew for every product. Here a sum and the norm behind it are one
pass, and so is rotation; nothing is kept in float32 for the gradient; frozen weights lie ready
(mmllm.kernels.prepacked_linear). Modules and weights are the model's own: what is not known (other
families, hooks, compiled layers, other devices) runs as it did before.

Legend: T positions of the pack, D width, H heads, E their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.kernels.forward_hooks import has_forward_hooks
from mmllm.kernels.lora_linear import frozen_linear, is_autocast, lora_linear, plain_adapter
from mmllm.kernels.pack_layout import PackLayout
from mmllm.kernels.packed_attention import packed_attention
from mmllm.kernels.prepacked_linear import PrepackCache, may_prepack
from mmllm.llm.stack import apply_rope, is_supported, rope_cos_sin

BLOCK_SIZE = 128
"""Positions that a core's cache holds while they are added and normed."""


class PackedDecoderStack:
    """The layers of one model, from embeddings to the last hidden states."""

    def __init__(self, decoder: Any):
        self.decoder = decoder
        small = may_prepack(decoder)
        layers = decoder.layers[: decoder.config.num_hidden_layers]
        self.layers = [TrainingLayer(layer, small) for layer in layers]

    @classmethod
    def build(cls, decoder: Any) -> PackedDecoderStack | None:
        """Of the part of a transformers model below its head; None for families not known here."""
        known = is_supported(decoder) and not getattr(decoder.config, "sliding_window", None)
        return cls(decoder) if known else None

    def supports(self, embeds: Tensor) -> bool:
        """Whether it gives what the model's own layers would for such embeddings, as they are."""
        weight = self.decoder.norm.weight
        plain = embeds.device.type == "cpu" and embeds.dtype == weight.dtype
        if not plain or is_autocast(embeds) or any(map(_is_customized, self.decoder.modules())):
            return False
        own = zip(self.layers, self.decoder.layers, strict=False)
        return is_supported(self.decoder) and all(layer.is_of(module) for layer, module in own)

    def __call__(self, embeds: Tensor, positions: Tensor, packing: PackLayout) -> Tensor:
        """float[1, T, D], int[1, T] -> float[1, T, D]"""
        cos, sin = rope_cos_sin(self.decoder.rotary_emb, embeds[0], positions[0])
        after = [layer.module.input_layernorm for layer in self.layers[1:]] + [self.decoder.norm]
        x = embeds[0]
        h = self.layers[0].module.input_layernorm(x)
        for layer, norm in zip(self.layers, after, strict=True):
            read = layer.attention(h, cos, sin, packing)
            x, h = add_rms_norm(layer.module.post_attention_layernorm, x, read)
            x, h = add_rms_norm(norm, x, layer.network(h))
        return h[None]


class TrainingLayer:
    """Attention and the gated network of one of transformers' layers."""

    def __init__(self, module: Any, small: bool):
        self.module = module
        self.q, self.k, self.v, self.o = (
            TrainingLinear(module.self_attn, f"{name}_proj", small) for name in "qkvo"
        )
        self.gate, self.up, self.down = (
            TrainingLinear(module.mlp, f"{name}_proj", small) for name in ("gate", "up", "down")
        )

    def is_of(self, module: Any) -> bool:
        """Whether this is still what the model has in this place."""
        parts = self.module.self_attn, self.module.mlp
        return module is self.module and parts == (self.q.parent, self.gate.parent)

    def attention(self, h: Tensor, cos: Tensor, sin: Tensor, packing: PackLayout) -> Tensor:
        """float[T, D], float[T, 1, E] twice -> float[T, D]"""
        module = self.module.self_attn
        q, k, v = (
            linear(h).view(len(h), -1, module.head_dim) for linear in (self.q, self.k, self.v)
        )
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        q, k = (RoPEFn.apply(heads, cos, sin) for heads in (q, k))  # pyright: ignore
        dropout = module.attention_dropout if module.training else 0.0
        read = packed_attention(module, q, k, v, packing, scaling=module.scaling, dropout=dropout)
        return self.o(read.flatten(1))

    def network(self, h: Tensor) -> Tensor:
        """float[T, D] -> float[T, D]"""
        return self.down(self.module.mlp.act_fn(self.gate(h)) * self.up(h))


class TrainingLinear:
    """A linear layer of a module, under whatever adapter it has when it is called."""

    def __init__(self, parent: nn.Module, name: str, small: bool):
        self.parent, self.name = parent, name
        self.products = PrepackCache(small)

    def __call__(self, x: Tensor) -> Tensor:
        """float[T, I] -> float[T, O]"""
        module: Any = getattr(self.parent, self.name)
        base = getattr(module, "base_layer", module)
        if type(base) is not nn.Linear or any(weight.requires_grad for weight in base.parameters()):
            return module(x)
        frozen = self.products(base.weight, base.bias)
        if base is module or (module.disable_adapters and not module.merged):
            return frozen_linear(x, frozen)
        plain = plain_adapter(module)
        return module(x) if plain is None else lora_linear(x, frozen, *plain[1:])


def _is_customized(module: Any) -> bool:
    """Whether somebody put something around its forward, or trains what is frozen here."""
    trained = type(module).__name__.endswith("RMSNorm") and module.weight.requires_grad
    return trained or has_forward_hooks(module) or module._compiled_call_impl is not None


def add_rms_norm(norm: Any, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """x + branch, and that normed: float[T, D] twice -> float[T, D] twice"""
    return AddRMSNormFn.apply(x, branch, norm.weight, norm.variance_epsilon)  # pyright: ignore


class AddRMSNormFn(torch.autograd.Function):
    """A sum and its root mean square normalisation (Zhang and Sennrich 2019), in float32 within."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, scale = torch.empty_like(x), torch.empty_like(x), torch.empty(len(x), 1)
        exact_weight = weight.float()
        for one, other, whole, out, by in _blocks(x, branch, total, normed, scale):
            exact = torch.add(one, other, out=whole).float()
            by.copy_(torch.linalg.vecdot(exact, exact)[:, None])
            by.div_(x.shape[1]).add_(eps).rsqrt_()
            out.copy_((exact * by).mul_(exact_weight))
        ctx.save_for_backward(total, scale, exact_weight)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total, scale, weight = ctx.saved_tensors
        by_total, by_normed = gradients
        found = torch.empty_like(total)
        for whole, by, slope, out in _blocks(total, scale, by_normed, found):
            exact, slope = whole.float(), slope.float() * weight
            share = torch.linalg.vecdot(exact, slope)[:, None] * by.square() / total.shape[1]
            out.copy_(slope.addcmul_(exact, share, value=-1).mul_(by))
        if by_total is not None:
            found += by_total
        return found, found, None, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many positions of each."""
    return zip(*(tensor.split(BLOCK_SIZE) for tensor in tensors), strict=True)


class RoPEFn(torch.autograd.Function):
    """`apply_rope`, whose gradient is apply_rope back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(cos, sin)
        return apply_rope(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return apply_rope(gradients[0], cos, sin, -1), None, None
