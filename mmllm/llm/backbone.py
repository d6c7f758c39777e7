"""The layers of a language model below its head, from embeddings to hidden states.

They run by the decoder stacks that mmllm computes itself, for the families that those support
(mmllm.kernels.decoder_stack), else by transformers' own layers.

Legend: B sequences, T positions, W new positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm.kernels import packed_attention as packing
from mmllm.kernels.cached_attention import ForwardRequest
from mmllm.kernels.decoder_stack import CachedDecoderStack, PackedDecoderStack
from mmllm.kernels.devices import to_device
from mmllm.kernels.forward_hooks import ForwardHooks

if TYPE_CHECKING:
    from mmllm.llm.kv_cache import KVCache


class BackboneRunner:
    """Runs the layers of one transformers model. peft puts adapters into the same modules, so that
    the runner serves the model with and without them."""

    def __init__(self, base_model: Any):
        self.base_model = base_model

    @property
    def backbone(self) -> Any:
        """The layers below the head (what transformers calls the decoder)."""
        return self.base_model.get_decoder()

    def enable_prefix_packing(self) -> bool:
        """Set the attention by which packed conversations can share a prefix. Returns whether the
        model can: every layer has to be attention, full or sliding."""
        config = self.base_model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not kinds <= packing.SUPPORTED_LAYER_TYPES:
            return False
        packing.register_attention()
        self.base_model.set_attn_implementation(packing.ATTENTION_NAME)
        return True

    def forward(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Any,
        **options: Any,
    ) -> Tensor:
        """Hidden states by the cache's decoder stack, or by transformers' layers.

        Args:
            embeds: float[B, T, D].
            mask: bool[B, T (+ cached)], or a mask of four dimensions as it is.
            positions: int[B, T].
            cache: Read and extended, if any.
            options: More arguments of transformers' forward.

        Returns:
            float[B, T, D].
        """
        if stack := self._stack_of(cache):
            assert positions is not None
            return stack([ForwardRequest(embeds, positions, mask, cache)])[0]
        if cache is not None and mask is not None and mask.device.type == "cpu" and mask.all():
            mask = None  # else transformers would ask the device the same
        if mask is not None and mask.ndim == 2:
            mask = to_device(mask, embeds.device).long()
        states = self.backbone(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        ).last_hidden_state
        return states.to(embeds.device)  # the last device, of a model that is spread over several

    def forward_pack(
        self,
        embeds: Tensor,
        positions: Tensor | None,
        prefix_len: int,
        seq_lens: Sequence[int],
        *,
        recomputes: bool,
    ) -> Tensor:
        """Hidden states of a pack: float[1, T, D] -> float[1, T, D], by the packed decoder stack
        where it supports the model, else by transformers' layers with packed attention.
        `recomputes`: whether gradient checkpointing is at work, which only the latter have."""
        layout = packing.PackLayout.build(seq_lens, prefix_len, embeds.device)
        stack = self._packed_stack
        if stack and positions is not None and not recomputes and stack.supports(embeds):
            return stack(embeds, positions, layout)
        mask = packing.placeholder_mask(embeds)
        return self.forward(embeds, mask, positions, None, pack_layout=layout)

    def forward_shared_prefix(
        self, embeds: Tensor, mask: Tensor, positions: Tensor, prefix_len: int
    ) -> Tensor:
        """Hidden states of rows whose first positions are equal, float[B, T, D] -> float[B, T, D]:
        those are computed for one row, and their keys and values repeated for all."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.base_model.config)  # one that a gradient goes through
        first = slice(None, 1), slice(None, prefix_len)
        prefix = self.forward(embeds[first], mask[first], positions[first], cache)
        cache.batch_repeat_interleave(len(embeds))
        rest = self.forward(embeds[:, prefix_len:], mask, positions[:, prefix_len:], cache)
        return torch.cat([prefix.expand(len(embeds), -1, -1), rest], dim=1)

    def forward_requests(self, requests: Sequence[ForwardRequest]) -> list[Tensor] | None:
        """Hidden states float[B, W, D] of each request by one decoder stack, which reads the
        weights once for all; None where there is no such stack."""
        stack = self._stack_of(requests[-1].cache)
        return stack(requests) if stack else None

    def new_cache(self, hooks: ForwardHooks) -> KVCache:
        """An empty cache, with the decoder stack that extends it. `hooks`: of the whole model."""
        from mmllm.llm.kv_cache import KVCache

        cache = KVCache(self.base_model.config)
        cache.hooks = hooks
        cache.stack = CachedDecoderStack.build(self.backbone) if cache.croppable else None
        return cache

    @cached_property
    def supports_cache_crop(self) -> bool:
        """Whether rows and positions can be taken out of its caches."""
        from mmllm.llm.kv_cache import KVCache

        return KVCache(self.base_model.config).croppable

    def _stack_of(self, cache: Any) -> CachedDecoderStack | None:
        """The decoder stack that extends a cache in place of the model's own forward; none while a
        hook is there, even if the cache was begun without one."""
        hooks = getattr(cache, "hooks", None)
        if not hooks:
            return getattr(cache, "stack", None)
        cache.was_hooked = cache.was_hooked or hooks.may_alter_outputs
        return None

    @cached_property
    def _packed_stack(self) -> PackedDecoderStack | None:
        return PackedDecoderStack.build(self.backbone)
