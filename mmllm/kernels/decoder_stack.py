"""The decoder layers of a Llama-like model, from embeddings to the last hidden states, computed
without calling transformers' modules.

One walk over the layers serves two attention modes: generation with a key-value cache
(mmllm.kernels.cached_attention, mmllm.kernels.inference_layer), and training on packs
(mmllm.kernels.packed_attention, mmllm.kernels.training_layer). The arithmetic and the weights are
the modules' own, adapters included. Whatever is not supported (other families, hooks, quantized
weights, other attention) is left to transformers.

Legend: N positions, D width, H heads, K key-value heads, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.kernels.cached_attention import CachedAttention, ForwardRequest, concat
from mmllm.kernels.forward_hooks import ForwardHooks
from mmllm.kernels.inference_layer import InferenceLayer
from mmllm.kernels.lora_linear import is_autocast
from mmllm.kernels.pack_layout import PackLayout
from mmllm.kernels.packed_attention import ATTENTION_NAME, packed_attention
from mmllm.kernels.prepacked_linear import may_prepack
from mmllm.kernels.rms_norm import RMSNorm
from mmllm.kernels.rope import rope_cos_sin
from mmllm.kernels.training_layer import TrainingLayer, is_customized

SUPPORTED_MODEL_TYPES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Families of transformers (the beginnings of their class names) whose layers have this form."""


def run_layers(
    layers: Sequence[Any],
    final_norm: Any,
    rotary: Any,
    x: Tensor,
    positions: Tensor,
    attend: Callable[..., Tensor],
    tapped_layers: Sequence[int] = (),
) -> Tensor:
    """Compute all layers, and the norm behind the last.

    Args:
        layers: InferenceLayers or TrainingLayers.
        final_norm: The model's last norm, of the kind that the layers have.
        rotary: transformers' rotary module.
        x: float[N, D], the embeddings.
        positions: int[N].
        attend: (index, layer, q, k, v) -> float[N, H * E], of rotated queries float[N, H, E], keys
            and values float[N, K, E].
        tapped_layers: layers, from 1, whose states are appended to the last ones.

    Returns:
        float[N, D * (1 + tapped layers)].
    """
    cos, sin = rope_cos_sin(rotary, x, positions)
    next_norms = [*(layer.input_norm for layer in layers[1:]), final_norm]
    h = layers[0].input_norm(x)
    tapped: dict[int, Tensor] = {}
    for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
        attended = attend(index, layer, *layer.qkv(h, cos, sin))
        x, h = layer.add_attention(x, attended)
        x, h = layer.add_mlp(x, h, next_norm)
        if index + 1 in tapped_layers:
            tapped[index + 1] = x
    return torch.cat([h, *(tapped[layer] for layer in tapped_layers)], dim=-1) if tapped else h


class CachedDecoderStack:
    """The layers for generation, with the weights and adapters as they are when it is built."""

    def __init__(self, layers: list[InferenceLayer], norm: RMSNorm, rotary: Any):
        self.layers = layers
        self.norm = norm
        self.rotary = rotary

    @classmethod
    def build(cls, decoder: Any) -> CachedDecoderStack | None:
        """Read the part of a transformers model below its head; None where it is not supported, or
        something hooks into it."""
        if decoder.config._attn_implementation != ATTENTION_NAME or not is_supported(decoder):
            return None
        if decoder.training or ForwardHooks(decoder):
            return None
        modules = decoder.layers[: decoder.config.num_hidden_layers]
        layers = [InferenceLayer.of(module) for module in modules]
        readable = [layer for layer in layers if layer is not None]
        if len(readable) < len(layers):
            return None
        return cls(readable, RMSNorm.of(decoder.norm), decoder.rotary_emb)

    def __call__(
        self, requests: Sequence[ForwardRequest], tapped_layers: Sequence[int] = ()
    ) -> list[Tensor]:
        """Compute the last hidden states float[B, W, D] of each request and extend its cache. The
        weights are read once for all requests.

        Args:
            requests: embeddings and caches.
            tapped_layers: layers whose states are appended (`run_layers`).
        """
        attention = CachedAttention(requests)
        x = concat([request.embeds.flatten(0, 1) for request in requests])
        positions = concat([request.positions.flatten() for request in requests])
        states = run_layers(
            self.layers, self.norm, self.rotary, x, positions, attention, tapped_layers
        )
        by_request = zip(requests, states.split(attention.sizes), strict=True)
        return [part.view(*request.embeds.shape[:2], -1) for request, part in by_request]


class PackedDecoderStack:
    """The layers for training on a pack. Weights that train, adapters that are switched and hooks
    that are added later are noticed at every call."""

    def __init__(self, decoder: Any):
        self.decoder = decoder
        prepack = may_prepack(decoder)
        modules = decoder.layers[: decoder.config.num_hidden_layers]
        self.layers = [TrainingLayer(module, prepack=prepack) for module in modules]

    @classmethod
    def build(cls, decoder: Any) -> PackedDecoderStack | None:
        """Make the stack of the part of a transformers model below its head; None where it is not
        supported."""
        has_window = getattr(decoder.config, "sliding_window", None)
        return cls(decoder) if is_supported(decoder) and not has_window else None

    def supports(self, embeds: Tensor) -> bool:
        """Whether it computes what the modules would now compute of such embeddings."""
        same_dtype = embeds.dtype == self.decoder.norm.weight.dtype and not is_autocast(embeds)
        if embeds.device.type != "cpu" or not same_dtype:
            return False
        if any(map(is_customized, self.decoder.modules())) or not is_supported(self.decoder):
            return False
        pairs = zip(self.layers, self.decoder.layers, strict=False)
        return all(layer.is_of(module) for layer, module in pairs)

    def __call__(
        self,
        embeds: Tensor,
        positions: Tensor,
        layout: PackLayout,
        tapped_layers: Sequence[int] = (),
    ) -> Tensor:
        """Compute the last hidden states of a pack: float[1, T, D], int[1, T] -> float[1, T, D]

        Args:
            embeds: the embeddings of the pack.
            positions: their position ids.
            layout: its sequences.
            tapped_layers: layers whose states are appended (`run_layers`).
        """

        def attend(_index: int, layer: TrainingLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            module = layer.module.self_attn
            dropout = module.attention_dropout if module.training else 0.0
            options = {"scaling": module.scaling, "dropout": dropout}
            return packed_attention(module, q, k, v, layout, **options).flatten(1)

        rotary, norm = self.decoder.rotary_emb, self.decoder.norm
        states = run_layers(
            self.layers, norm, rotary, embeds[0], positions[0], attend, tapped_layers
        )
        return states[None]


def is_supported(decoder: Any) -> bool:
    """Whether the part of a model below its head is of `SUPPORTED_MODEL_TYPES` and made of
    transformers' own modules throughout; only linear layers may be others."""
    family = type(decoder).__name__.removesuffix("Model")
    if family not in SUPPORTED_MODEL_TYPES:
        return False
    suffixes = {
        "self_attn": "Attention",
        "mlp": "MLP",
        "input_layernorm": "RMSNorm",
        "post_attention_layernorm": "RMSNorm",
    }
    parts = [(decoder.norm, "RMSNorm"), (decoder.rotary_emb, "RotaryEmbedding")]
    for layer in decoder.layers:
        parts.append((layer, "DecoderLayer"))
        parts += [(getattr(layer, name, None), suffix) for name, suffix in suffixes.items()]
    return all(type(part).__name__ == family + suffix for part, suffix in parts)
