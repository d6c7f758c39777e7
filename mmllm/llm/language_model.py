"""Any generative language model of transformers, from embeddings to losses, with LoRA adapters and
small tables of signal tokens. Its own weights stay frozen.

The contract that the rest of mmllm builds on: `embed` ids, `forward` embeddings to hidden states
(`forward_with_cache` in generation, `forward_windows` for plain text), then `head` for logits, or
`token_nll` and `kl_divergence` for losses that never hold all logits in memory.

Legend: B sequences, T positions, D width, V text vocabulary, R signal tokens, O outputs,
P gathered positions, W windows of S positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmllm.errors import CheckpointError, ConfigError, quoted
from mmllm.kernels.backend import Backend, UsesKernels, resolve_backend
from mmllm.kernels.cached_attention import ForwardRequest
from mmllm.kernels.forward_hooks import ForwardHooks, has_forward_hooks
from mmllm.kernels.linear_cross_entropy import FrozenHead, LogitTransform
from mmllm.kernels.prepacked_linear import PrepackCache, may_prepack, tensor_versions
from mmllm.kernels.reference import ReferenceHead
from mmllm.kernels.registry import (
    DecoderForward,
    head_linear,
    linear_cross_entropy,
    lora_linear,
)
from mmllm.llm import adapters
from mmllm.llm.signal_tokens import append_signal_logits, embed_tokens, init_signal_tables
from mmllm.llm.tapped_states import TappedStates
from mmllm.llm.templates import chat_template
from mmllm.tokens import Sources, TokenSpace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmllm.llm.kv_cache import KVCache
    from mmllm.llm.loading import CausalLMConfig


class LanguageModel(TappedStates, UsesKernels, nn.Module):
    """A frozen causal LM that takes embeddings, with signal tokens and adapters that may train.

    Attributes:
        model: The transformers model, inside a peft model once adapters are attached.
        signal_embeddings: Input embeddings of the signal tokens, float[R, D].
        signal_head: Rows of the head for the outputs, float[O, D]: one per output, because only the
            first token of a signal span is ever predicted (mmllm.tokens).
    """

    def __init__(
        self, config: CausalLMConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ):
        super().__init__()
        self.config = config
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.tokens = TokenSpace(len(self.embedding.weight), {})
        self.signal_embeddings = nn.Parameter(torch.zeros(0, self.width))
        self.signal_head = nn.Parameter(torch.zeros(0, self.width))
        self.logit_transform = LogitTransform.of(self.base_model.config.get_text_config())
        self.chat_template = chat_template(config.chat_template, tokenizer)
        self.kernels = resolve_backend()
        self.decoder_forward = DecoderForward(self.base_model, config.attention, self.kernels)

    # --- what it is -----------------------------------------------------------------------------

    @property
    def base_model(self) -> Any:
        """The transformers model inside, with or without peft around it."""
        return self.model.get_base_model() if self.has_lora else self.model

    @property
    def backbone(self) -> Any:
        """The layers below the head, from embeddings to hidden states (transformers' decoder)."""
        return self.decoder_forward.backbone

    @property
    def embedding(self) -> nn.Embedding:
        """The table of text tokens."""
        return self.model.get_input_embeddings()

    @property
    def width(self) -> int:
        """D"""
        return self.embedding.weight.shape[1]

    @property
    def max_length(self) -> int:
        """Tokens that fit: the config's figure within the model's own limit, or the memory's."""
        if self.config.memory is not None:
            return self.config.memory.max_length
        limit = getattr(self.base_model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.config.max_length, limit or self.config.max_length)

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a turn: the tokenizer's and the generation config's."""
        configured = self.base_model.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id]
        ends += configured if isinstance(configured, list) else [configured]
        return frozenset(token for token in ends if isinstance(token, int))

    @property
    def pad_id(self) -> int:
        """The id that fills the end of a shorter row; masked, so that its value does not matter."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @cached_property
    def embedding_scale(self) -> float:
        """Root mean square of embedded tokens, the scale that projected media take; 1 for a table
        on the meta device. Computed once, of the frozen table as it was loaded."""
        if self.embedding.weight.is_meta:
            return 1.0
        rows = torch.linalg.vector_norm(self.embedding.weight, dim=1, dtype=torch.float32)
        rms = rows.square().mean().sqrt().item() / math.sqrt(self.width)
        return rms * self.embedding_multiplier

    @property
    def embedding_multiplier(self) -> float:
        """The factor by which the family multiplies rows of its table (Gemma: sqrt(D))."""
        return float(getattr(self.embedding, "scalar_embed_scale", 1.0))

    @property
    def supports_prefix_packing(self) -> bool:
        """Whether packs can share a prefix: with sdpa, of layers of full or sliding attention."""
        return self.decoder_forward.supports_prefix_packing

    @property
    def is_quantized(self) -> bool:
        """Whether bitsandbytes keeps the weights."""
        return bool(getattr(self.base_model, "is_quantized", False))

    @property
    def has_lora(self) -> bool:
        """Whether adapters are attached."""
        return hasattr(self.model, "peft_config")

    @property
    def is_hooked(self) -> bool:
        """Whether a forward hook may look into what the model computes, or alter it. Every position
        of every prompt is then computed by the modules' own forward. (accelerate's hooks, which
        place weights, do not count.)"""
        return ForwardHooks(self.model).may_alter_outputs

    @property
    def version(self) -> Hashable:
        """A key that stays equal as long as no weight is changed in place or replaced, no adapter
        switched, no module replaced, and no hook added or removed."""
        modules = list(self.modules())
        weights = [weight for module in modules for weight in module._parameters.values()]
        switches = tuple(module.__dict__.get("_disable_adapters") for module in modules)
        versions = tensor_versions(weight for weight in weights if weight is not None)
        return versions, switches, tuple(map(id, modules)), ForwardHooks(self).fingerprint

    # --- what may train -------------------------------------------------------------------------

    def add_signal_tokens(self, signal_tokens: dict[str, int], generator: torch.Generator) -> None:
        """Draw tables for every output's signal tokens, at the scale of the text embeddings.

        Args:
            signal_tokens: Number of signal tokens by output key.
            generator: Source of randomness.

        Raises:
            CheckpointError: The embedding table holds NaN or infinite values.
        """
        scale = self.embedding_scale
        if not math.isfinite(scale):
            raise CheckpointError(
                f"llm.weights {quoted(self.config.weights)}: its embedding holds NaN or infinite "
                "values; is the copy whole?"
            )
        self.tokens = TokenSpace(len(self.embedding.weight), signal_tokens)
        self.signal_embeddings, self.signal_head = init_signal_tables(
            self.tokens, self.width, scale, generator
        )

    def attach_lora(self) -> None:
        """Attach fresh adapters, which change nothing until they are trained. Raises ConfigError if
        the config has no `lora`, or peft refuses its options."""
        if self.has_lora:
            return
        if self.config.lora is None:
            raise ConfigError("llm.lora is null, but this stage or checkpoint uses LoRA")
        self.model = adapters.attach_lora(
            self.model,
            self.config.lora,
            base_name=self.config.weights,
            layers={} if self.is_quantized else lora_linear(self.kernels),
        )

    def load_lora(self, folder: Path) -> None:
        """Attach adapters and fill them from a folder in peft's format. Raises CheckpointError if
        the folder has none as safetensors, or names or shapes differ."""
        file = adapters.find_adapter(folder)
        self.attach_lora()
        adapters.load_adapter(self.model, file)

    def save_lora(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the adapters in peft's format; nothing of the base model is written.

        Args:
            folder: receives the weights and peft's config.
            dtype: what the weights are converted to; None keeps theirs.
        """
        adapters.save_adapter(self.model, folder, dtype)

    def lora_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and matrix of every adapter; nothing without LoRA."""
        return adapters.lora_parameters(self.model) if self.has_lora else iter(())

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Context in which the adapters are disabled; on exit those train that trained before."""
        return adapters.adapters_disabled(self.model) if self.has_lora else nullcontext()

    # --- from ids to hidden states --------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """int[B, T] -> float[B, T, D]; placeholders are zero until media are placed there."""
        return embed_tokens(ids, self.embedding, self.signal_embeddings, self.tokens)

    def forward(
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
        """Compute the last hidden states, after the final norm; behind them those of tapped layers.

        Args:
            embeds: float[B, T, D].
            mask: bool[B, T (+ cached)], True at real positions. With a cache it is best on the CPU:
                a device would be waited for.
            positions: int[B, T], the position ids.
            cache: One of `new_cache` or of transformers, which is read and extended.
            prefix_len: The first positions that are the same in all rows (a system prompt, say);
                they are computed once for all of them.
            seq_lens: For a pack: the one row holds `prefix_len` positions and then, one behind the
                other, conversations of these lengths that all begin with them. Where
                `supports_prefix_packing` is False the prefix has to be empty, and transformers
                separates the conversations by their `positions`, which restart at 0.
            sources: What the embeddings stand for, for hooks and media that are read as a whole.

        Returns:
            float[B, T, D].
        """
        return self.decoder_forward.decoder_forward(
            embeds,
            mask=mask,
            positions=positions,
            cache=cache,
            prefix_len=prefix_len,
            seq_lens=seq_lens,
            sources=sources,
        )

    def forward_windows(self, embeds: Tensor) -> Tensor:
        """Hidden states of windows that do not see one another: float[W, S, D] -> float[W * S, D].
        They are packed where the model packs."""
        if not self.supports_prefix_packing:
            return self(embeds).flatten(0, 1)
        count, length, _ = embeds.shape
        positions = torch.arange(length, device=embeds.device).repeat(count)[None]
        seq_lens = (length,) * count
        return self(embeds.flatten(0, 1)[None], positions=positions, seq_lens=seq_lens)[0]

    def forward_with_cache(self, requests: Sequence[ForwardRequest]) -> list[Tensor]:
        """Hidden states of several batches, each with its own cache, which is extended. Where the
        layers are known (mmllm.kernels.decoder_stack) the weights are read once for all batches.

        Returns:
            float[B, W, D] for each request.
        """
        if len(requests) > 1 and not has_forward_hooks(self):
            states = self.decoder_forward.forward_requests(requests)
            if states is not None:
                return states
        return [self(each.embeds, **each.options) for each in requests]

    def new_cache(self, **memory: int) -> KVCache:
        """An empty key-value cache for generation, with the decoder stack that extends it: of the
        weights as they are now. `memory`: options of `llm.memory`, in place of the config's."""
        from mmllm.llm.memory import MemoryOptions, new_cache

        options = MemoryOptions(**memory) if memory else self.config.memory
        if options is not None:
            self.decoder_forward.enable_retrieval()
        cache = new_cache(self.base_model, options)
        cache.hooks = ForwardHooks(self.model)
        cache.stack = self.decoder_forward.build_cached_stack() if cache.croppable else None
        return cache

    @cached_property
    def supports_cache_crop(self) -> bool:
        """Whether rows and positions can be removed from its caches; not with sliding windows or
        recurrent states."""
        from mmllm.llm.kv_cache import KVCache

        return KVCache(self.base_model.config).croppable

    # --- from hidden states to logits and losses ------------------------------------------------

    def head(self, hidden: Tensor) -> Tensor:
        """float[P, D] -> logits float[P, V + O], text tokens first. Tapped layers are ignored.

        Gather the supervised positions first: one contiguous product over few rows is many times
        faster than the head over a whole batch.
        """
        hidden = self.last_states(hidden)
        module = self.base_model.get_output_embeddings()
        text = head_linear(module, hidden, self.kernels)
        text = text[..., : self.tokens.vocab_size].to(hidden.device)
        return self.logit_transform(append_signal_logits(text, hidden, self.signal_head))

    def token_nll(self, hidden: Tensor, labels: Tensor, *, liger: bool = False) -> Tensor:
        """Compute the negative log-likelihood of each label.

        The P x V logits are never in memory at once.

        Args:
            hidden: float[P, D], last hidden states.
            labels: int[P]: token ids; those from V on are outputs (mmllm.tokens).
            liger: use Liger's fused kernel, which needs CUDA.

        Returns:
            float32[P], -ln p.
        """
        return self._loss_head(liger).token_nll(self.last_states(hidden), labels)

    def kl_divergence(self, hidden: Tensor, base_hidden: Tensor) -> Tensor:
        """KL(base || adapted) of the next token, from the hidden states of both.

        Probability mass on signal tokens counts as divergence, because the base has none there.

        Args:
            hidden: float[P, D], of the adapted model.
            base_hidden: float[P, D], of the base model; gets no gradient.

        Returns:
            float32[P].
        """
        states, base_states = self.last_states(hidden), self.last_states(base_hidden)
        return self._loss_head().kl_divergence(states, base_states)

    # --- how it runs ----------------------------------------------------------------------------

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each layer's input in training, and run the layer again for the gradient:
        less memory for about a third more time (Chen et al. 2016)."""
        self.base_model.activation_checkpointing_enable({"use_reentrant": False})

    def compile_layers(self) -> None:
        """torch.compile, layer by layer: what is compiled for one serves all that are alike. The
        names of parameters stay."""
        for layer in self.backbone.layers:
            layer.compile(dynamic=True)

    def use_kernels(self, backend: Backend) -> None:
        """Take the fast paths, or the reference (mmllm.kernels.backend), from the next call on."""
        super().use_kernels(backend)
        self.decoder_forward.use_kernels(backend)

    def _loss_head(self, liger: bool = False) -> FrozenHead | ReferenceHead:
        return linear_cross_entropy(
            self.base_model.get_output_embeddings(),
            self.signal_head,
            self.logit_transform,
            self.tokens.vocab_size,
            self.head,
            packed=self._prepacked_head,
            liger=liger,
            backend=self.kernels,
        )

    @cached_property
    def _prepacked_head(self) -> PrepackCache:
        return PrepackCache(may_prepack(self.base_model))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        """Apply `to`, `cuda` and the like, except to a model that is spread over devices."""
        is_spread = getattr(self.base_model, "hf_device_map", None)
        if self.config.device_map is None or not is_spread:
            return super()._apply(fn, recurse)
        return super()._apply(fn, recurse=False)
