"""Any causal language model of transformers, with LoRA and a small table of new token rows.

Legend: B sequences, T positions, D width, V text vocabulary, R signal tokens, O outputs,
P gathered positions.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import CheckpointError, ConfigError, brief_reason, quoted, wrap_errors
from mmllm.kernels import packed_attention as packing
from mmllm.kernels.cached_attention import ForwardRequest
from mmllm.kernels.decoder_stack import CachedDecoderStack, PackedDecoderStack
from mmllm.kernels.devices import to_device
from mmllm.kernels.forward_hooks import ForwardHooks, has_forward_hooks
from mmllm.kernels.inference_layer import matmul
from mmllm.kernels.linear_cross_entropy import FrozenHead, LogitTransform
from mmllm.kernels.lora_linear import fused_lora_linear
from mmllm.kernels.precision import parse_dtype
from mmllm.kernels.prepacked_linear import PrepackCache, may_prepack, tensor_versions
from mmllm.llm.templates import chat_template, check_template
from mmllm.tokens import TokenSpace
from mmllm.utils import sandbox
from mmllm.utils.hints import did_you_mean
from mmllm.weights import (
    PICKLE_SUFFIXES,
    are_weights_skipped,
    check_parameter_count,
    copy_tensors,
    locate,
    remote_code_disabled,
    resolve_inside,
    save_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NOT_FOR_LORA = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules"), "has a key of its own"),
    **dict.fromkeys(("task_type", "peft_type", "inference_mode"), "is always the same"),
    **dict.fromkeys(
        ("bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
        "would train what no checkpoint of mmllm holds",
    ),
}
"""Options of peft that `llm.lora.options` cannot have, and why."""


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (Hu et al. 2021), by peft. `targets`: module names, or "all-linear".
    `options`: more of peft's `LoraConfig` by its names (use_rslora, use_dora, rank_pattern, …)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CausalLMConfig:
    """`weights`: a folder, a .gguf file, a hub id ("owner/name", or "owner/name/file.gguf"), or
    `mini:…` for an asset that is fetched by package name.

    `system_prompt` opens every conversation that brings none of its own.
    `chat_template`: plain, vicuna or a .jinja file; null is the tokenizer's own.
    `template_options`: variables of the template, {enable_thinking: false} for Qwen3, say.
    `max_length`: context in tokens that is used (the model's own limit still holds).
    `dtype`: of the frozen weights; null is what the stage or the caller chooses.
    `quantization`: the frozen linear layers in 4 bits (NF4 with its constants quantised too, as in
    QLoRA, Dettmers et al. 2023) or 8 bits, by bitsandbytes.
    `device_map`: "auto", or module -> device: the model spread over devices, by accelerate.
    """

    weights: str
    lora: LoraOptions | None = field(default_factory=LoraOptions)
    system_prompt: str = ""
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    max_length: int = 2048
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    device_map: Mapping[str, int | str] | str | None = None


class LanguageModel(nn.Module):
    """A causal LM that takes embeddings and knows signal tokens; its own weights stay frozen.

    peft's trainable token rows copy the whole embedding table at every step; the signal tokens have
    small tables of their own: `signal_embeddings` float[R, D] for input and `signal_head`
    float[O, D] for output (one row per output: only the first token of a signal span is ever
    predicted, see mmllm.tokens).
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
        self.supports_prefix_packing = self._use_packing()
        self.liger_loss = False
        _check_head(self)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def width(self) -> int:
        """D"""
        return self.embedding.weight.shape[1]

    @property
    def max_length(self) -> int:
        """Tokens that fit: the config's figure within the model's own limit."""
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
        """What fills the end of a shorter row; masked, so that its value does not matter."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @property
    def embedding_scale(self) -> float:
        """Root mean square of embedded tokens: the scale that projected media take. 1 where the
        table holds no numbers (a plan)."""
        if self.embedding.weight.is_meta:
            return 1.0
        table = self.embedding.weight.float().square().mean().sqrt().item()
        return table * self.embedding_multiplier

    @property
    def embedding_multiplier(self) -> float:
        """What the family multiplies rows of its table with (Gemma: the square root of D)."""
        return float(getattr(self.embedding, "scalar_embed_scale", 1.0))

    @property
    def is_quantized(self) -> bool:
        """Whether bitsandbytes keeps the weights."""
        return bool(getattr(self.base_model, "is_quantized", False))

    @property
    def has_lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def base_model(self) -> Any:
        """The transformers model inside, with or without peft around it."""
        return self.model.get_base_model() if self.has_lora else self.model

    def add_signal_tokens(self, signal_tokens: dict[str, int], generator: torch.Generator) -> None:
        """Make rows for every output's signal tokens, at the scale of the existing rows."""
        self.tokens = TokenSpace(len(self.embedding.weight), signal_tokens)
        scale = self.embedding_scale
        if not math.isfinite(scale):
            raise CheckpointError(
                f"llm.weights {quoted(self.config.weights)}: its embedding holds NaN or infinite "
                "values; is the copy whole?"
            )
        self.signal_embeddings = nn.Parameter(
            torch.randn(self.tokens.num_signals, self.width, generator=generator) * scale
        )
        self.signal_head = nn.Parameter(
            torch.randn(len(signal_tokens), self.width, generator=generator) * scale * 0.1
        )

    def attach_lora(self) -> None:
        """Add fresh adapters (they change nothing until trained). Needs `lora` in the config."""
        if self.has_lora:
            return
        if self.config.lora is None:
            raise ConfigError("llm.lora is null, but this stage or checkpoint uses LoRA")
        from peft import get_peft_model

        lora = _lora_config(self.config.lora)
        _check_patterns(self.config.lora, self.base_model)
        if not self.is_quantized:
            lora._register_custom_module({nn.Linear: fused_lora_linear()})
        with torch.random.fork_rng(devices=[]):  # the same adapters in every process and run
            torch.manual_seed(0)
            try:
                self.model = get_peft_model(self.model, lora)  # pyright: ignore[reportArgumentType]
            except (ValueError, TypeError, ImportError) as error:
                raise ConfigError(f"llm.lora: peft refuses it: {error}") from error
        # By the name that the config gives it, not by the folder that it was loaded from.
        self.model.peft_config["default"].base_model_name_or_path = self.config.weights
        for name, parameter in self.lora_parameters():
            parameter.requires_grad_(False)
            assert "lora_" in name

    def load_lora(self, folder: Path) -> None:
        """Adapters from a folder in peft's own format; raises CheckpointError if they differ. Only
        its safetensors are read: not the pickle that peft would take, nor peft's config."""
        from peft import get_peft_model_state_dict

        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise CheckpointError(
                f"{file}: absent ({names}); adapters are read from safetensors alone, no pickle is"
            )
        self.attach_lora()
        own = get_peft_model_state_dict(self.model, save_embedding_layers=False)  # not copies
        remedy = "do llm.weights, llm.lora.rank and llm.lora.targets match the checkpoint?"
        copy_tensors(own, file, remedy=remedy)

    def save_lora(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Adapters in peft's own format; nothing of the base model is written."""
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        config = self.model.peft_config["default"]
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        save_tensors(
            {name: value.to(dtype or value.dtype) for name, value in state.items()},
            folder / "adapter_model.safetensors",
        )
        inference, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = inference

    def lora_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and adapter matrix; empty without LoRA."""
        if self.has_lora:
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    yield name, parameter

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Within it the adapters do nothing; after it those train that trained before, where peft
        would train them all."""
        if not self.has_lora:
            yield
            return
        trained = [(weight, weight.requires_grad) for _, weight in self.lora_parameters()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for weight, trains in trained:
                weight.requires_grad_(trains)

    def embed(self, ids: Tensor) -> Tensor:
        """int[B, T] -> float[B, T, D]; placeholders are zero until media are placed there."""
        vocabulary = self.tokens.vocab_size
        text = self.embedding(ids.clamp_max(vocabulary - 1)).to(ids.device)
        # One zero row stands for the placeholder; without outputs the table is that row alone.
        table = F.pad(self.signal_embeddings, (0, 0, 0, 1)).to(text.dtype)
        new = F.embedding((ids - vocabulary).clamp(0, self.tokens.num_signals), table)
        return torch.where((ids < vocabulary)[..., None], text, new)

    def forward(
        self,
        embeds: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        prefix_len: int = 0,
        seq_lens: Sequence[int] = (),
    ) -> Tensor:
        """float[B, T, D] -> last hidden states float[B, T, D], after the final norm.

        `mask` bool[B, T (+ cached)] marks real positions; with a cache it is best on the CPU, as a
        device would be waited for. `cache`: one of `new_cache`, or of
        transformers, that is read and extended. `prefix_len`: the first positions are the same in
        all rows (a system prompt, say) and are computed once for all of them. `seq_lens`: the one
        row holds `prefix_len` positions and then, one behind the other, conversations of these
        lengths that all begin with them; where `supports_prefix_packing` is False there may be none
        shared, and transformers keeps conversations apart by their `positions`, which restart at 0.
        """
        if seq_lens and self.supports_prefix_packing:
            rows = packing.PackLayout.build(seq_lens, prefix_len, embeds.device)
            stack = self._packed_stack
            if stack and positions is not None and not self._recomputes and stack.supports(embeds):
                return stack(embeds, positions, rows)
            return self._run(
                embeds, packing.placeholder_mask(embeds), positions, None, pack_layout=rows
            )
        if prefix_len == 0 or self._recomputes:  # layers that run again cannot extend a cache
            return self._run(embeds, mask, positions, cache)
        assert mask is not None
        assert positions is not None
        assert cache is None
        from transformers import DynamicCache

        cache = DynamicCache(config=self.base_model.config)  # one that a gradient goes through
        prefix = self._run(
            embeds[:1, :prefix_len], mask[:1, :prefix_len], positions[:1, :prefix_len], cache
        )
        cache.batch_repeat_interleave(len(embeds))
        rest = self._run(embeds[:, prefix_len:], mask, positions[:, prefix_len:], cache)
        return torch.cat([prefix.expand(len(embeds), -1, -1), rest], dim=1)

    def forward_windows(self, embeds: Tensor) -> Tensor:
        """Rows without padding, each by itself: float[W, S, D] -> last hidden states
        float[W * S, D]. Where the model packs they are a pack."""
        if not self.supports_prefix_packing:
            return self(embeds).flatten(0, 1)
        count, length, _ = embeds.shape
        positions = torch.arange(length, device=embeds.device).repeat(count)[None]
        seq_lens = (length,) * count
        return self(embeds.flatten(0, 1)[None], positions=positions, seq_lens=seq_lens)[0]

    def forward_with_cache(self, passes: Sequence[ForwardRequest]) -> list[Tensor]:
        """What `forward` gives for each; the weights are read once for all where the layers are
        known (mmllm.kernels.decoder_stack)."""
        stack = self._stack_on(passes[-1].cache)
        if stack and len(passes) > 1 and not has_forward_hooks(self):
            return stack(passes)
        return [
            self(new.embeds, mask=new.mask, positions=new.positions, cache=new.cache)
            for new in passes
        ]

    def gradient_checkpointing_enable(self) -> None:
        """Keep only what enters each layer in training, and run the layer again for the gradient:
        memory for about a third more time (Chen et al. 2016)."""
        self.base_model.activation_checkpointing_enable({"use_reentrant": False})

    def compile_layers(self) -> None:
        """torch.compile, layer by layer: what is compiled for one serves all that are alike. The
        names of parameters stay."""
        for layer in self.backbone.layers:
            layer.compile(dynamic=True)

    @property
    def _recomputes(self) -> bool:
        return self.training and bool(self.base_model.is_activation_checkpointing)

    def _run(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Any,
        **options: Any,
    ) -> Tensor:
        if stack := self._stack_on(cache):
            assert positions is not None
            return stack([ForwardRequest(embeds, positions, mask, cache)])[0]
        if cache is not None and mask is not None and mask.device.type == "cpu" and mask.all():
            mask = None  # else transformers would ask the device the same
        states = self.backbone(
            inputs_embeds=embeds,
            attention_mask=mask
            if mask is None or mask.ndim > 2
            else to_device(mask, embeds.device).long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        ).last_hidden_state
        return states.to(embeds.device)  # of a model that is spread they are where its end is

    def _stack_on(self, cache: Any) -> CachedDecoderStack | None:
        """What extends a cache in place of the model's own forward; nothing does where somebody
        hooks into the model, even if the cache was begun without."""
        hooks = getattr(cache, "hooks", None)
        if not hooks:
            return getattr(cache, "stack", None)
        cache.was_hooked = cache.was_hooked or hooks.may_alter_outputs
        return None

    @cached_property
    def _packed_stack(self) -> PackedDecoderStack | None:
        return PackedDecoderStack.build(self.backbone)

    def _use_packing(self) -> bool:
        """Whether packed conversations can share their opening: with sdpa, where every layer is
        attention, full or sliding."""
        of = self.base_model.config.get_text_config()
        kinds = set(getattr(of, "layer_types", None) or ["full_attention"])
        if self.config.attention != "sdpa" or not kinds <= packing.SUPPORTED_LAYER_TYPES:
            return False
        packing.register_attention()
        self.base_model.set_attn_implementation(packing.ATTENTION_NAME)
        return True

    def head(self, hidden: Tensor) -> Tensor:
        """float[P, D] -> logits float[P, V + O]; rows of outputs come after the text tokens.

        Gather the supervised positions first: one contiguous product over few rows is many times
        faster than the head over a whole batch.
        """
        module = self.base_model.get_output_embeddings()
        plain = type(module) is nn.Linear and module.bias is None and hidden.ndim == 2
        rows = plain and not ForwardHooks(module)
        text = matmul(hidden, module.weight.t()) if rows else module(hidden)
        text = text[..., : self.tokens.vocab_size].to(hidden.device)
        begins = hidden @ self.signal_head.to(hidden).T
        return self.logit_transform(torch.cat([text, begins.to(text)], dim=-1))

    def token_nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """-log p of each label, float[P, D] and int[P] -> float32[P], without P x V logits that
        stand in memory together."""
        head = self._plain_head()
        if head is None:
            return F.cross_entropy(self.head(hidden).float(), labels, reduction="none")
        return head.token_nll(hidden, labels)

    def kl_divergence(self, hidden: Tensor, fixed: Tensor) -> Tensor:
        """How far what is said after `hidden` float[P, D] is from the words that would be said
        after `fixed` float[P, D], which gets no gradient: float32[P], Kullback-Leibler divergences.
        """
        head = self._plain_head()
        if head is not None:
            return head.kl_divergence(hidden, fixed)
        count = self.tokens.vocab_size
        said = self.head(hidden).float().log_softmax(-1)[:, :count]
        wanted = self.head(fixed)[:, :count].float().log_softmax(-1)
        return F.kl_div(said, wanted, reduction="none", log_target=True).sum(-1)

    def _plain_head(self) -> FrozenHead | None:
        """None for one that is quantised, or that somebody hooks into."""
        module = self.base_model.get_output_embeddings()
        if type(module) is not nn.Linear or ForwardHooks(module):
            return None
        count = self.tokens.vocab_size
        bias = None if module.bias is None else module.bias[:count]
        words = self._head_products(module.weight[:count], bias)
        return FrozenHead(words, self.signal_head, self.logit_transform, self.liger_loss)

    @cached_property
    def _head_products(self) -> PrepackCache:
        return PrepackCache(may_prepack(self.base_model))

    @property
    def version(self) -> Hashable:
        """Equal as long as no weight was changed in place or replaced, no adapter switched, no
        module replaced, and no hook added or removed."""
        modules = list(self.modules())
        weights = [weight for module in modules for weight in module._parameters.values()]
        switches = tuple(module.__dict__.get("_disable_adapters") for module in modules)
        known = tensor_versions(weight for weight in weights if weight is not None)
        return known, switches, tuple(map(id, modules)), ForwardHooks(self).fingerprint

    @property
    def is_hooked(self) -> bool:
        """Whether somebody looks into what the model computes, or changes it: then every position
        of every prompt is read, by the modules' own forward. (accelerate's hooks do neither.)"""
        return ForwardHooks(self.model).may_alter_outputs

    def new_cache(self) -> Any:
        """An empty key-value cache for generation, and what runs on it
        (mmllm.kernels.decoder_stack): of the weights as they are now."""
        from mmllm.llm.cache import KVCache

        cache = KVCache(self.base_model.config)
        cache.hooks = ForwardHooks(self.model)
        cache.stack = CachedDecoderStack.build(self.backbone) if cache.croppable else None
        return cache

    @cached_property
    def supports_cache_crop(self) -> bool:
        """Whether rows and positions can be taken out of its caches: not if it forgets."""
        from mmllm.llm.cache import KVCache

        return KVCache(self.base_model.config).croppable

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        """`to` and its like: a model that is spread over devices stays where it is."""
        spread = getattr(self.base_model, "hf_device_map", None)
        if self.config.device_map is None or not spread:
            return super()._apply(fn, recurse)
        return super()._apply(fn, recurse=False)

    @property
    def backbone(self) -> Any:
        """The stack below the head: what turns embeddings into hidden states."""
        return self.base_model.get_decoder()


@contextmanager
def _few_words(head: Any) -> Iterator[None]:
    """Within it a plain linear head has its first words alone: what is done to their logits is done
    to all, and the rest of the weights is not read from the disk for it."""
    if type(head) is not nn.Linear or head.bias is not None or hasattr(head, "_hf_hook"):
        yield
        return
    whole = head.weight.data
    head.weight.data = whole[:64]
    try:
        yield
    finally:
        head.weight.data = whole


@torch.no_grad()
def _check_head(llm: LanguageModel) -> None:
    """The model's own forward and `head` agree on a hidden state: a family that does to its logits
    what LogitTransform does not know is refused here, and not trained wrongly."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    base = llm.base_model
    weight = base.get_output_embeddings().weight
    if weight.is_meta:
        return
    dtype = llm.embedding.weight.dtype
    hidden = torch.randn(1, 1, llm.width, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(weight.device, dtype)
    decoder = llm.backbone
    hooked = decoder.__dict__.get("forward")  # by accelerate, where a device map spreads it
    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)  # pyright: ignore
    try:
        with _few_words(base.get_output_embeddings()):
            wanted = base(inputs_embeds=hidden, use_cache=False).logits[0]
            found = llm.head(hidden[0])[:, : wanted.shape[-1]]
    finally:
        del decoder.forward
        if hooked is not None:
            decoder.forward = hooked
    if not torch.allclose(found.float(), wanted.float(), rtol=0.05, atol=0.05):
        raise ConfigError(
            f"llm.weights: the family {base.config.model_type!r} treats its logits in a way that "
            "mmllm does not know (LogitTransform): it cannot be used yet"
        )


def build(
    config: CausalLMConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LanguageModel:
    """Load tokenizer and model from a folder, a .gguf file, a hub id or an asset."""
    dtype = parse_dtype(config.dtype) if config.dtype else dtype
    where = f"llm.weights {quoted(config.weights)} cannot be loaded"
    with wrap_errors(CheckpointError, where), remote_code_disabled():
        source = _source(config.weights)
        if are_weights_skipped():
            return _build_on_meta(config, source, dtype)
        return _build(config, source, dtype, device)


def _build(
    config: CausalLMConfig, source: dict[str, Any], dtype: torch.dtype, device: str
) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sandbox.start()  # for the chat template, meanwhile
    gguf = "gguf_file" in source
    options = {
        "dtype": dtype,
        "attn_implementation": config.attention,
        **_quantization(config, dtype, gguf=gguf),
    }
    if config.device_map is not None:
        mapping = config.device_map
        options["device_map"] = mapping if isinstance(mapping, str) else dict(mapping)
    elif config.quantization:
        options["device_map"] = {"": device}  # quantised where it will be used
    if not gguf:
        options["use_safetensors"] = True
        names = _check_files(config.weights, Path(source["pretrained_model_name_or_path"]))
    try:
        if not gguf and names:
            _check_size(source, names)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source, **options, output_loading_info=True
        )
        model, report = loaded
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"llm.weights {quoted(config.weights)} cannot be loaded: {_told(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"llm.weights {quoted(config.weights)} lacks {len(missing)} weights, first "
            f"{missing[0]!r}; was it saved completely?"
        )
    if gguf:
        _forget_gguf(model)
    if "device_map" not in options:
        model = model.to(device)  # pyright: ignore[reportArgumentType] - its wrapper's signature
    llm = LanguageModel(config, model, tokenizer)
    check_template(llm.chat_template, tokenizer)
    return llm


_CONVERT = (
    "from transformers import AutoModelForCausalLM as Model; "
    "Model.from_pretrained({folder!r}, use_safetensors=False, dtype='auto')"
    ".save_pretrained({folder!r})"
)


def _check_files(weights: str, source: Path) -> list[str]:
    """The names in a local folder; none for the id of a hub. CheckpointError for a folder that
    holds no model, or its weights as a pickle only."""
    if not source.exists():
        return []
    if not source.is_dir():
        raise CheckpointError(f"llm.weights {weights!r}: expected a folder or a .gguf file")
    names = sorted(path.name for path in source.iterdir())
    if "config.json" not in names:
        raise CheckpointError(
            f"llm.weights {weights!r} has no config.json ({', '.join(names[:8]) or 'nothing'}); is "
            "it the folder of a model?"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"llm.weights {weights!r} is the folder of an adapter, which names another model: "
            "merge the two with peft (merge_and_unload) and give the merged folder"
        )
    if any(name.endswith(".safetensors") for name in names):
        return names
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if not pickles:
        raise CheckpointError(f"llm.weights {weights!r} has no *.safetensors; is the copy whole?")
    program = _CONVERT.format(folder=str(source.resolve()))
    raise CheckpointError(
        f"llm.weights {weights!r} has no *.safetensors, only {pickles[0]}, a pickle, which is not "
        f"read here; if you trust it, convert it once:\n  python -c {shlex.quote(program)}"
    )


def _check_size(source: dict[str, Any], names: Sequence[str]) -> None:
    """Raises CheckpointError if an index names files outside the folder, or if config.json
    describes more than the weights hold: transformers would make what is missing, then tell."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(source["pretrained_model_name_or_path"])
    shards = {name for name in names if name.endswith(".safetensors")}
    for name in names:
        if name.endswith(".safetensors.index.json"):
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            shards |= {str(shard) for shard in index["weight_map"].values()}
    files = [resolve_inside(folder, name, "llm.weights", follow=True) for name in sorted(shards)]
    for name in {"generation_config.json"}.intersection(names):  # transformers passes over it
        with wrap_errors(CheckpointError, folder / name):
            json.loads((folder / name).read_text(encoding="utf-8"))

    if "tokenizer.json" in names:
        _check_tokenizer(folder / "tokenizer.json")

    def make() -> nn.Module:
        of = AutoConfig.from_pretrained(**source)
        return AutoModelForCausalLM.from_config(
            of, attn_implementation="eager", trust_remote_code=False
        )

    check_parameter_count(folder / "config.json", files, make)


_MOST_GROWTH = 64.0
"""Times as long as a tokenizer may make a text before it splits it, or when it writes one."""


def _check_tokenizer(file: Path) -> None:
    """Raises CheckpointError for a tokenizer whose replacements make of a word a gigabyte: the
    library works on it out of Python's reach, until the memory ends."""
    text = resolve_inside(file.parent, file.name, "llm.weights", follow=True).read_text(
        encoding="utf-8"
    )
    if '"Replace"' not in text:  # most have none, and some have 30 MB
        return
    with wrap_errors(CheckpointError, file):
        tree = json.loads(text)
        for key in ("normalizer", "decoder"):
            growth = _growth(tree.get(key))
            if growth > _MOST_GROWTH:
                raise CheckpointError(
                    f"{file}: {key}: its replacements make texts {growth:.3g} times as long, more "
                    f"than {_MOST_GROWTH:g}"
                )


def _growth(step: Any) -> float:
    """How many times as long a step of a tokenizer, or a sequence of steps, makes a text."""
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Replace":
        pattern = step["pattern"].get("String", "")
        return max(len(step["content"]) / max(len(pattern), 1), 1.0)
    steps = [*step.get("normalizers", ()), *step.get("decoders", ())]
    return math.prod(map(_growth, steps))


def _told(error: Exception) -> str:
    """A library's message; of one that speaks of the hub the first line, and what can be done."""
    message = str(error)
    if "trust_remote_code" in message:
        return (
            "it brings code of its own, which is never run here; only families that transformers "
            "itself implements can be loaded"
        )
    if "huggingface.co" not in message and "gated" not in message:
        return message if len(message) < 1000 else brief_reason(error)
    return (
        f"{message.splitlines()[0]}; give a folder, correct the id, log in with `hf auth login` if "
        "it is gated, or, where it has no safetensors, download its pickle into a folder and give "
        "that, to be told how to convert it"
    )


def _build_on_meta(
    config: CausalLMConfig, source: dict[str, Any], dtype: torch.dtype
) -> LanguageModel:
    """The model on the meta device, and a tokenizer without words: nothing will be rendered."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    try:
        of = AutoConfig.from_pretrained(**source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"llm.weights {quoted(config.weights)}: no usable config.json: {_told(error)}"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            of, dtype=dtype, attn_implementation=config.attention
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    return LanguageModel(config, model, tokenizer)


def local_tokenizer(weights: str) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
    """The tokenizer of an LLM and the ids that its generation config ends with, without the
    weights and from this machine alone. Raises CheckpointError."""
    from transformers import AutoTokenizer, GenerationConfig

    source = {**_source(weights), "local_files_only": True}
    with wrap_errors(CheckpointError, f"llm.weights {quoted(weights)}: no tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
    folder = source["pretrained_model_name_or_path"]
    try:
        ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except (OSError, ValueError):  # it need not have one
        ends = None
    return tokenizer, frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _source(weights: str) -> dict[str, Any]:
    """What `from_pretrained` opens, by its parameters' names. Code that lies with the weights is
    not run, and nobody is asked whether it should be."""
    source: dict[str, Any] = {"trust_remote_code": False}
    if not weights.endswith(".gguf"):
        return {**source, "pretrained_model_name_or_path": locate(weights, "llm.weights")}
    folder, _, file = weights.rpartition("/")
    path = Path(weights).expanduser()
    if path.is_file():
        folder, file = str(path.parent), path.name
    else:
        folder = locate(folder, "llm.weights")
    return {**source, "pretrained_model_name_or_path": folder, "gguf_file": file}


def _quantization(config: CausalLMConfig, dtype: torch.dtype, *, gguf: bool) -> dict[str, Any]:
    """The parameter of `from_pretrained` that says how weights are kept."""
    if gguf:
        from transformers import GgufConfig

        if config.quantization:
            raise ConfigError(
                f"llm.quantization: {config.quantization} cannot be made of a .gguf file, whose "
                "weights are quantised already; give the model's safetensors, or leave it out"
            )
        return {"quantization_config": GgufConfig(dequantize=True)}
    if config.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"llm.quantization: {config.quantization} needs bitsandbytes, which is not installed; "
            "pip install 'mmllm[quantization]', or leave it out"
        )
    from transformers import BitsAndBytesConfig

    four = config.quantization == "4bit"
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def _forget_gguf(model: Any) -> None:
    """A model that remembers that its weights were quantised refuses to be saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    for memory in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, memory):
            delattr(model.config, memory)


def _check_patterns(options: LoraOptions, model: nn.Module) -> None:
    """Raises ConfigError for a pattern of modules' names that is none, or that takes for ever."""
    more = options.options
    patterns = [
        options.targets if isinstance(options.targets, str) else None,
        *(more.get(key) for key in ("exclude_modules", "layers_pattern")),
        *(name for key in ("rank_pattern", "alpha_pattern") for name in more.get(key) or ()),
    ]
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if isinstance(pattern, str) and pattern != "all-linear":
            try:
                sandbox.full_matches(pattern, names)
            except (sandbox.InputRejected, sandbox.ResourcesExhausted) as error:
                raise ConfigError(f"llm.lora: the pattern {quoted(pattern)}: {error}") from error


def _lora_config(options: LoraOptions) -> Any:
    """peft's LoraConfig; raises ConfigError for an option that it does not have or mmllm keeps."""
    from peft import LoraConfig

    known = {entry.name for entry in fields(LoraConfig)} - _NOT_FOR_LORA.keys()
    for name in options.options:
        if name in _NOT_FOR_LORA:
            raise ConfigError(f"llm.lora.options: {name!r} {_NOT_FOR_LORA[name]}")
        if name not in known:
            hint = did_you_mean(name, known, cutoff=0.5)
            raise ConfigError(f"llm.lora.options: peft's LoraConfig has no {name!r}{hint}")
    targets = options.targets
    try:
        return LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType] - floats work
            lora_dropout=options.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
            **options.options,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"llm.lora: peft refuses it: {error}") from error
