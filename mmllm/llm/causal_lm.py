"""Any causal language model of transformers, with LoRA and a small table of new token rows.

Legend: B sequences, T positions, D width, V text vocabulary, R signal tokens, O outputs,
P gathered positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmllm.errors import CheckpointError, ConfigError
from mmllm.tokens import TokenSpace
from mmllm.weights import are_left_out, locate, save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHUNK = 1024
"""Positions whose logits stand in memory at once in training."""


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (Hu et al. 2021), by peft. `targets`: module names, or "all-linear"."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"


@dataclass(frozen=True)
class CausalLMConfig:
    """`weights`: a folder, a hub id, or `mini:…` for an asset that is fetched by package name.

    `system_prompt` opens every conversation that brings none of its own.
    `max_length`: context in tokens that is used (the model's own limit still holds).
    """

    weights: str
    lora: LoraOptions | None = field(default_factory=LoraOptions)
    system_prompt: str = ""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    max_length: int = 2048


class LanguageModel(nn.Module):
    """A causal LM that reads embeddings and new tokens; its own weights stay frozen.

    peft's trainable token rows copy the whole embedding table at every step; the rows here are a
    table of their own: `rows` float[R, D] for input, `head_rows` float[O, D] for output (one row
    an output: only the beginning of a signal run is ever predicted, see mmllm.tokens).
    """

    def __init__(
        self, config: CausalLMConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ):
        super().__init__()
        self.config = config
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.tokens = TokenSpace(len(self.embedding.weight), {})
        self.rows = nn.Parameter(torch.zeros(0, self.width))
        self.head_rows = nn.Parameter(torch.zeros(0, self.width))

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
        limit = getattr(self._base.config.get_text_config(), "max_position_embeddings", None)
        return min(self.config.max_length, limit or self.config.max_length)

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a turn: the tokenizer's and the generation config's."""
        configured = self._base.generation_config.eos_token_id
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
        """Root mean square of the embedding table: the scale that projected media take. 1 where
        the table holds no numbers (a plan)."""
        if self.embedding.weight.is_meta:
            return 1.0
        return self.embedding.weight.float().square().mean().sqrt().item()

    @property
    def has_lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def _base(self) -> Any:
        """The transformers model inside, with or without peft around it."""
        return self.model.get_base_model() if self.has_lora else self.model

    def add_outputs(self, signal_tokens: dict[str, int], generator: torch.Generator) -> None:
        """Make rows for every output's signal tokens, at the scale of the existing rows."""
        self.tokens = TokenSpace(len(self.embedding.weight), signal_tokens)
        scale = self.embedding_scale
        self.rows = nn.Parameter(
            torch.randn(self.tokens.num_signals, self.width, generator=generator) * scale
        )
        self.head_rows = nn.Parameter(
            torch.randn(len(signal_tokens), self.width, generator=generator) * scale * 0.1
        )

    def attach_lora(self) -> None:
        """Add fresh adapters (they change nothing until trained). Needs `lora` in the config."""
        if self.has_lora:
            return
        if self.config.lora is None:
            raise ConfigError("llm.lora is null, but this stage or checkpoint uses LoRA")
        from peft import LoraConfig, get_peft_model

        options = self.config.lora
        targets = options.targets
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType] - floats work
            lora_dropout=options.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):  # the same adapters in every process and run
            torch.manual_seed(0)
            self.model = get_peft_model(self.model, lora)  # pyright: ignore[reportArgumentType]
        # By the name that the config gives it, not by the folder that it was loaded from.
        self.model.peft_config["default"].base_model_name_or_path = self.config.weights
        for name, parameter in self.lora_parameters():
            parameter.requires_grad_(False)
            assert "lora_" in name

    def load_lora(self, folder: Path) -> None:
        """Adapters from a folder in peft's own format; raises CheckpointError if they differ."""
        from peft import load_peft_weights

        self.attach_lora()
        own = {_adapter_key(name): value for name, value in self.lora_parameters()}
        saved = load_peft_weights(str(folder), device="cpu")
        if own.keys() != saved.keys():
            odd = sorted(own.keys() ^ saved.keys())
            raise CheckpointError(
                f"{folder}: LoRA adapters differ from the config in {len(odd)} entries, "
                f"first {odd[0]!r}; do llm.weights and llm.lora match the checkpoint?"
            )
        for name, value in own.items():
            if value.shape != saved[name].shape:
                raise CheckpointError(
                    f"{folder}: {name}: expected {list(value.shape)}, got "
                    f"{list(saved[name].shape)}; was it trained with another llm.lora.rank?"
                )
            value.data.copy_(saved[name])

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

    def untouched(self) -> AbstractContextManager:
        """Within it the adapters do nothing."""
        return self.model.disable_adapter() if self.has_lora else nullcontext()

    def embed(self, ids: Tensor) -> Tensor:
        """int[B, T] -> float[B, T, D]; placeholders are zero until media are placed there."""
        vocabulary = self.tokens.vocabulary
        text = self.embedding(ids.clamp_max(vocabulary - 1))
        # One zero row stands for the placeholder; without outputs the table is that row alone.
        table = F.pad(self.rows, (0, 0, 0, 1)).to(text.dtype)
        new = F.embedding((ids - vocabulary).clamp(0, self.tokens.num_signals), table)
        return torch.where((ids < vocabulary)[..., None], text, new)

    def forward(
        self,
        embeds: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        shared: int = 0,
    ) -> Tensor:
        """float[B, T, D] -> last hidden states float[B, T, D], after the final norm.

        `mask` bool[B, T (+ cached)] marks real positions. `positions` int[B, T] that restart at 0
        without a mask are packed sequences: transformers then keeps them apart. `cache`: a
        transformers Cache that is read and extended. `shared`: the first positions are the same
        in all rows (a system prompt, say) and are computed once for all of them.
        """
        if shared == 0 or self._recomputes:  # layers that run again cannot extend a cache
            return self._run(embeds, mask, positions, cache)
        assert mask is not None
        assert positions is not None
        assert cache is None
        cache = self.new_cache()
        opening = self._run(embeds[:1, :shared], mask[:1, :shared], positions[:1, :shared], cache)
        cache.batch_repeat_interleave(len(embeds))
        rest = self._run(embeds[:, shared:], mask, positions[:, shared:], cache)
        return torch.cat([opening.expand(len(embeds), -1, -1), rest], dim=1)

    def recompute_activations(self) -> None:
        """Keep only what enters each layer in training, and run the layer again for the gradient:
        memory for about a third more time (Chen et al. 2016)."""
        self._base.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def _recomputes(self) -> bool:
        return self.training and bool(self._base.is_activation_checkpointing)

    def _run(
        self, embeds: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any
    ) -> Tensor:
        return self._decoder(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """float[P, D] -> logits float[P, V + O]; rows of outputs come after the text tokens.

        Gather the supervised positions first: one contiguous product over few rows is many times
        faster than the head over a whole batch.
        """
        text = self._base.get_output_embeddings()(hidden)[..., : self.tokens.vocabulary]
        return torch.cat([text, hidden @ self.head_rows.to(hidden.dtype).T], dim=-1)

    def nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """-log p of each label, float[P, D] and int[P] -> float32[P].

        More than a chunk of positions is done chunk by chunk, and once more for the gradient, so
        that P x V logits never stand in memory at once.
        """
        if len(labels) <= CHUNK:
            return self._nats(hidden, labels)
        parts = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        found: list[Any] = [checkpoint(self._nats, *part, use_reentrant=False) for part in parts]
        return torch.cat(found)

    def _nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden).float(), labels, reduction="none")

    def new_cache(self) -> Any:
        """An empty key-value cache for generation."""
        from transformers import DynamicCache

        return DynamicCache(config=self._base.config)

    @property
    def _decoder(self) -> Any:
        """The stack below the head: what turns embeddings into hidden states."""
        return self._base.get_decoder()


def build(
    config: CausalLMConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LanguageModel:
    """Load tokenizer and model from a folder, a hub id or an asset."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = locate(config.weights, "llm.weights")
    if are_left_out():
        return _hollow(config, source, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=config.attention, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"llm.weights {config.weights!r} cannot be loaded: {error}"
        ) from error
    return LanguageModel(config, model.to(device), tokenizer)  # pyright: ignore[reportArgumentType]


def _hollow(config: CausalLMConfig, source: str, dtype: torch.dtype) -> LanguageModel:
    """The model on the meta device, and a tokenizer without words: nothing will be rendered."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    try:
        of = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"llm.weights {config.weights!r}: {source} has no usable config.json: {error}"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            of, dtype=dtype, attn_implementation=config.attention
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    return LanguageModel(config, model, tokenizer)


def _adapter_key(name: str) -> str:
    """A parameter's name -> its key in an adapter file."""
    return name.replace(".default.", ".")
