"""The one door to the kernels: every choice between a fast path and its reference is made here.

`auto` takes a fast path wherever it supports the model, the device and the dtypes; `reference`
takes none, and computes everything by torch, transformers and peft alone (mmllm.kernels.reference).
README.md in this folder lists the kernels.

Legend: B sequences, T positions, W new positions, P gathered positions, D width, V text vocabulary,
O signal tokens that can be predicted (outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.errors import ConfigError
from mmllm.kernels import packed_attention
from mmllm.kernels.backend import Backend
from mmllm.kernels.cached_attention import ForwardRequest
from mmllm.kernels.decoder_stack import CachedDecoderStack, PackedDecoderStack
from mmllm.kernels.devices import to_device
from mmllm.kernels.forward_hooks import ForwardHooks
from mmllm.kernels.inference_layer import matmul
from mmllm.kernels.linear_cross_entropy import FrozenHead, LogitTransform
from mmllm.kernels.lora_linear import fused_lora_linear
from mmllm.kernels.pack_layout import PackLayout
from mmllm.kernels.prepacked_linear import PrepackCache
from mmllm.kernels.reference import ReferenceHead, forward_unpacked
from mmllm.tokens import Sources

_ATTENTION_TYPES = {*packed_attention.SUPPORTED_LAYER_TYPES, "chunked_attention", "attention"}
"""transformers' `layer_types` of layers that read keys and values of earlier positions, and have no
state besides."""


class DecoderForward:
    """The forward pass of one transformers model below its head, by whichever path applies. peft
    puts adapters into the same modules, so that it serves the model with and without them.

    Args:
        base_model: The transformers model.
        attention: `llm.attention` of the config; only with sdpa can packs share a prefix.
        backend: The kernels to begin with.

    Attributes:
        supports_prefix_packing: Whether packed sequences can share a prefix: every layer has to be
            attention, full or sliding.
        is_recurrent: Whether a layer has a state that every position changes (linear attention, a
            state space, a convolution): rows are then computed from their first position on, and
            nothing stands between two positions of a row.
        whole_media: Ids in `Sources` of media whose positions attend to one another.
        tapped_layers: Layers, from 1, whose states are appended to the last ones: all states that
            are returned are then float[..., D * (1 + layers)], the last ones first.
    """

    def __init__(self, base_model: Any, attention: str, backend: Backend):
        self.base_model = base_model
        self._retrieves = False
        self._attention = attention
        config = base_model.config.get_text_config()
        self._has_towers = config is not base_model.config
        types = set(_layer_types(config))
        is_attention = types <= packed_attention.SUPPORTED_LAYER_TYPES
        self.supports_prefix_packing = attention == "sdpa" and is_attention
        self.is_recurrent = not types <= _ATTENTION_TYPES
        self.tapped_layers: tuple[int, ...] = ()
        self.whole_media: list[int] = []
        self.backend: Backend = backend
        self.use_kernels(backend)

    def use_kernels(self, backend: Backend) -> None:
        """Switch between the kernels, transformers' attention function included."""
        name = "sdpa"
        if backend == "auto" or self._retrieves:
            packed_attention.register_attention()
            name = packed_attention.ATTENTION_NAME
        if self.supports_prefix_packing and name != self._attention:
            # Towers keep theirs: their attention is not causal.
            owner = self.backbone if self._has_towers else self.base_model
            owner.set_attn_implementation(name)
            self._attention = name
        self.backend = backend

    def enable_retrieval(self) -> None:
        """Let attention read parts of a cache (mmllm.llm.retrieval), which that of transformers
        cannot: from now on it is mmllm's, whichever kernels are in use."""
        if not self._retrieves:
            self._retrieves = True
            self.use_kernels(self.backend)

    @property
    def backbone(self) -> Any:
        """The layers below the head (what transformers calls the decoder)."""
        return self.base_model.get_decoder()

    def decoder_forward(
        self,
        embeds: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        prefix_len: int = 0,
        seq_lens: Sequence[int] = (),
        sources: Sources | None = None,
    ) -> Tensor:
        """Compute the last hidden states of a batch, a pack, or new positions of a cache.

        Args:
            embeds: float[B, T, D], or wider (DeepStack).
            mask: bool[B, T (+ cached)], True at real positions.
            positions: int[B, T], or int[B, T, 3] with M-RoPE.
            cache: Read and extended, if any.
            prefix_len: The first positions that are the same in all rows, or stand once in a pack.
            seq_lens: Lengths of a pack's sequences, without the prefix; empty for a batch.
            sources: What the embeddings stand for, where `whole_media` are among them.

        Returns:
            float[B, T, D].
        """
        if chunk := _chunk_length(cache, embeds):
            assert positions is not None
            parts = [slice(start, start + chunk) for start in range(0, embeds.shape[1], chunk)]
            states = [
                self.decoder_forward(embeds[:, part], positions=positions[:, part], cache=cache)
                for part in parts
            ]
            return torch.cat(states, dim=1)
        backbone = self.backbone
        recomputes = backbone.training and bool(self.base_model.is_activation_checkpointing)
        if self.whole_media and sources is not None:
            whole_media = torch.tensor(self.whole_media, device=sources.ids.device)
            if (is_whole := torch.isin(sources.ids, whole_media)).any():
                return self._forward_whole_media(embeds, mask, positions, cache, is_whole, seq_lens)
        if seq_lens and self.supports_prefix_packing:
            if self.backend == "reference":
                rows = positions if positions is not None and positions.ndim == 3 else None
                return forward_unpacked(self._forward_batch, embeds, prefix_len, seq_lens, rows)
            return self._forward_pack(embeds, positions, prefix_len, seq_lens, recomputes)
        if stack := self._cached_stack(cache):
            assert positions is not None
            return stack([ForwardRequest(embeds, positions, mask, cache)], self.tapped_layers)[0]
        if seq_lens and (self.is_recurrent or self._has_towers):
            raise ConfigError(self._refuses_packs())
        # Layers that run again for their gradient cannot extend a cache.
        is_whole = recomputes or self.is_recurrent or self.backend == "reference"
        if prefix_len == 0 or is_whole:
            return self._forward_batch(embeds, mask, positions, cache)
        assert mask is not None
        assert positions is not None
        return self._forward_shared_prefix(embeds, mask, positions, prefix_len)

    def forward_requests(self, requests: Sequence[ForwardRequest]) -> list[Tensor] | None:
        """Compute the hidden states float[B, W, D] of each request by one decoder stack, which
        reads the weights once for all; None where there is no such stack."""
        stack = self._cached_stack(requests[-1].cache)
        return stack(requests, self.tapped_layers) if stack else None

    def build_cached_stack(self) -> CachedDecoderStack | None:
        """Build the stack that extends a new cache, of the weights as they are now; None where
        transformers' layers have to."""
        return CachedDecoderStack.build(self.backbone) if self.backend == "auto" else None

    def _refuses_packs(self) -> str:
        kind = self.base_model.config.get_text_config().model_type
        if self.is_recurrent:
            types = sorted(set(_layer_types(self.base_model.config.get_text_config())))
            return (
                f"conversations cannot be packed for {kind!r}, whose layers ({', '.join(types)}) "
                "would carry the state of one into the next: set stage.pack to false, and "
                "stage.length_window to spare padding"
            )
        return (
            f"conversations are packed for {kind!r} with llm.attention sdpa only, got "
            f"{self._attention}: set that, or stage.pack to false"
        )

    def _forward_pack(
        self,
        embeds: Tensor,
        positions: Tensor | None,
        prefix_len: int,
        seq_lens: Sequence[int],
        recomputes: bool,
    ) -> Tensor:
        """Compute a pack by the packed decoder stack where it supports the model, else by
        transformers' layers with packed attention: float[1, T, D] -> float[1, T, D]"""
        layout = PackLayout.build(seq_lens, prefix_len, embeds.device)
        stack = self._packed_stack
        if stack and positions is not None and not recomputes and stack.supports(embeds):
            return stack(embeds, positions, layout, self.tapped_layers)
        mask = packed_attention.placeholder_mask(embeds)
        return self._forward_batch(embeds, mask, positions, pack_layout=layout)

    def _forward_whole_media(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Any,
        is_whole: Tensor,
        seq_lens: Sequence[int],
    ) -> Tensor:
        """Compute a batch in which the positions of a medium attend to one another, also to later
        ones (Gemma 3): those that bool[B, T] `is_whole` marks, a run for each medium."""
        if seq_lens:
            raise ConfigError(
                "conversations cannot be packed where media attend to themselves in both "
                f"directions ({self.base_model.config.model_type!r}): set stage.pack to false"
            )
        masks = self.base_model.create_masks_for_generate(
            self.base_model.config,
            inputs_embeds=embeds,
            attention_mask=None if mask is None else to_device(mask, embeds.device).long(),
            past_key_values=cache,
            position_ids=positions,
            token_type_ids=to_device(is_whole, embeds.device).long(),
        )
        return self._forward_batch(embeds, masks, positions, cache)

    def _forward_shared_prefix(
        self, embeds: Tensor, mask: Tensor, positions: Tensor, prefix_len: int
    ) -> Tensor:
        """Compute rows whose first positions are equal: those are computed for one row, and their
        keys and values repeated for all. float[B, T, D] -> float[B, T, D]"""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.base_model.config)  # one that a gradient goes through
        first = slice(None, 1), slice(None, prefix_len)
        prefix = self._forward_batch(embeds[first], mask[first], positions[first], cache)
        cache.batch_repeat_interleave(len(embeds))
        rest = self._forward_batch(embeds[:, prefix_len:], mask, positions[:, prefix_len:], cache)
        return torch.cat([prefix.expand(len(embeds), -1, -1), rest], dim=1)

    def _forward_batch(
        self,
        embeds: Tensor,
        mask: Any,
        positions: Tensor | None,
        cache: Any = None,
        **options: Any,
    ) -> Tensor:
        """Compute by transformers' layers: float[B, T, D] -> float[B, T, D]. `mask` is bool[B, T (+
        cached)], or one of transformers' own and is passed on; `options` are transformers'. Wider
        embeddings float[B, T, D * (1 + n)] hold what is added to the states of the first n layers
        (DeepStack, Meng et al. 2024), zero where it is text."""
        width = int(self.base_model.get_input_embeddings().weight.shape[1])
        if embeds.shape[-1] > width:
            self._check_deepstack(embeds.shape[-1] // width - 1)
            embeds, *added = torch.split(embeds, width, dim=-1)
            everywhere = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            options["visual_pos_masks"] = everywhere
            options["deepstack_visual_embeds"] = [part.flatten(0, 1) for part in added]
        if positions is not None and positions.ndim == 3:
            positions = positions.movedim(-1, 0)  # M-RoPE
        if not getattr(cache, "reads_all", True):
            options["retrieval"] = cache
        is_2d = isinstance(mask, Tensor) and mask.ndim == 2
        if is_2d and cache is not None and mask.device.type == "cpu" and mask.all():
            mask = None  # else transformers would wait for the device to find out
        elif is_2d:
            mask = to_device(mask, embeds.device).long()
        output = self.backbone(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=bool(self.tapped_layers) or None,
            **options,
        )
        # On the last device, of a model that is spread over several.
        states = output.last_hidden_state.to(embeds.device)
        if not self.tapped_layers:
            return states
        tapped = [output.hidden_states[layer].to(embeds.device) for layer in self.tapped_layers]
        return torch.cat([states, *tapped], dim=-1)

    def _check_deepstack(self, num: int) -> None:
        """Raise ConfigError where the model adds nothing to the states of `num` layers."""
        vision = getattr(self.base_model.config, "vision_config", None)
        if len(getattr(vision, "deepstack_visual_indexes", None) or ()) != num:
            raise ConfigError(
                f"input_projections: identity: the media's features are {num + 1} times as wide as "
                "embeddings of the language model: only its own encoder (type backbone) fits"
            )

    def _cached_stack(self, cache: Any) -> CachedDecoderStack | None:
        """Return the decoder stack that extends a cache in place of the model's own forward; none
        while there is a hook, even if the cache was begun without one."""
        hooks = getattr(cache, "hooks", None)
        if not hooks:
            return getattr(cache, "stack", None) if self.backend == "auto" else None
        cache.was_hooked = cache.was_hooked or hooks.may_alter_outputs
        return None

    @cached_property
    def _packed_stack(self) -> PackedDecoderStack | None:
        return PackedDecoderStack.build(self.backbone)


def _layer_types(config: Any) -> Sequence[str]:
    """The kind of each layer, by a config of transformers."""
    for name in ("layer_types", "layers_block_type"):
        if types := getattr(config, name, None):
            return list(types)
    return ["full_attention"]


def _chunk_length(cache: Any, embeds: Tensor) -> int | None:
    """Return how many positions of float[B, T, D] a cache takes at a time; None: all."""
    length = getattr(cache, "chunk_length", None)
    return length if length and embeds.shape[1] > length else None


def head_linear(module: Any, hidden: Tensor, backend: Backend) -> Tensor:
    """Apply a language model's output layer; a plain one by the fastest product for P rows.

    Args:
        module: the output layer.
        hidden: float[P, D].
        backend: `reference` calls the module.

    Returns:
        float[P, V].
    """
    is_plain = _is_plain_linear(module) and module.bias is None and hidden.ndim == 2
    if backend == "auto" and is_plain and not ForwardHooks(module):
        return matmul(hidden, module.weight.t())
    return module(hidden)


def linear_cross_entropy(
    module: Any,
    signal_head: Tensor,
    transform: LogitTransform,
    vocab_size: int,
    logits: Callable[[Tensor], Tensor],
    *,
    packed: PrepackCache,
    liger: bool,
    backend: Backend,
) -> FrozenHead | ReferenceHead:
    """Return what computes the losses of a head: without P x V logits in memory, unless it is
    quantized or hooked.

    Args:
        module: The output layer over text tokens.
        signal_head: float[O, D].
        transform: What the family does to the logits.
        vocab_size: V, the first rows of the output layer that are used.
        logits: float[P, D] -> float[P, V + O], for the reference.
        packed: The output layer's packed weight.
        liger: Use Liger's kernel (CUDA).
        backend: The kernels in use.
    """
    if backend == "reference" or not _is_plain_linear(module) or ForwardHooks(module):
        return ReferenceHead(logits, vocab_size)
    bias = None if module.bias is None else module.bias[:vocab_size]
    vocab = packed(module.weight[:vocab_size], bias)
    return FrozenHead(vocab, signal_head, transform, liger)


def lora_linear(backend: Backend) -> dict[type[nn.Module], type[nn.Module]]:
    """Return the layers that peft is to use in place of its own, by the layer that they adapt."""
    return {nn.Linear: fused_lora_linear()} if backend == "auto" else {}


def _is_plain_linear(module: Any) -> bool:
    """Return whether a layer is torch's own linear layer, neither quantized nor adapted."""
    return type(module) is nn.Linear
