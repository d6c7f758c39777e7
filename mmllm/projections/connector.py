"""The connector: many learned queries, read through a deep bidirectional encoder.

MetaQuery (Pan et al. 2025, sec. 3) adds N learned queries behind the prompt, which the language
model reads causally; here these are the signal tokens, which are fed, not predicted. Their states
go through a bidirectional encoder and then a linear map to the decoder's condition (that order
needs fewer parameters than the other, sec. 4.2). It is trained by the decoder's own denoising loss,
so that it need not imitate the decoder's text encoder.

Legend: M media, W words, K signal tokens, S = W + K positions read, n layers read, D LLM width,
d width of the encoder, P positions of a sequence of the condition, E its width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import CheckpointError, ConfigError, quoted, wrap_errors
from mmllm.kernels.backend import UsesKernels, resolve_backend
from mmllm.kernels.short_attention import short_attention
from mmllm.projections.base import OutputProjection
from mmllm.utils.quiet import quiet_libraries
from mmllm.weights import are_weights_skipped, locate, remote_code_disabled

_ATTENTION = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class ConnectorConfig:
    """Learned queries through a bidirectional encoder, one linear map per tensor of the condition
    (MetaQuery, Pan et al. 2025; docs/connectors.md).

    Attributes:
        signal_tokens: K, the learned queries.
        layers: layers of the encoder; with `weights`, the first so many of its layers.
        width: the width of the encoder, a multiple of `heads`.
        heads: attention heads.
        feed_forward: the width between the two layers of a feed-forward network.
        dropout: dropout in the encoder.
        weights: a causal language model of transformers that the encoder starts from, read without
            its causal mask: a folder or a hub id. Width, heads and feed_forward are then its own.
        llm_layers: the layers of the LLM after which states are read, from 1; the last is the state
            behind the final norm. They are averaged by learned gates. Empty: the last alone.
        words: W, how many words of the reply in front of the medium are read in addition to the
            signal tokens, such as the caption that the reply says first.
        condition_dropout: the share of media that the loss `denoise` conditions on a learned null
            condition, which guidance then moves away from (Ho and Salimans 2022); 0: no null
            condition, and guidance is over the decoder's own empty caption.
    """

    signal_tokens: int = 64
    layers: int = 6
    width: int = 512
    heads: int = 8
    feed_forward: int = 2048
    dropout: float = 0.0
    weights: str | None = None
    llm_layers: tuple[int, ...] = ()
    words: int = 0
    condition_dropout: float = 0.1


class Connector(UsesKernels, OutputProjection):
    """The projection that `ConnectorConfig` describes.

    Position p of a sequence of the condition is read at position p of the signal tokens; where the
    condition is longer, and for each pooled vector, the encoder gets another learned token.
    """

    def __init__(
        self, config: ConnectorConfig, condition_shapes: Mapping[str, tuple[int, ...]], width: int
    ):
        super().__init__(
            config.signal_tokens,
            condition_shapes,
            llm_layers=config.llm_layers,
            num_words=config.words,
        )
        self.use_kernels(resolve_backend())
        self.condition_dropout = config.condition_dropout
        num_layers = max(len(config.llm_layers), 1)
        # Channels are standardised by what was measured before training (`standardize`).
        self.shift = nn.Parameter(torch.zeros(num_layers, width))
        self.scale = nn.Parameter(torch.ones(num_layers, width))
        if num_layers > 1:  # one row for signal tokens, one for words
            self.gates = nn.Parameter(torch.zeros(2 if config.words else 1, num_layers))
        self.encoder, inner, scale = _encoder(config)
        self.inward = nn.Linear(width, inner)
        nn.init.normal_(self.inward.weight, std=scale / math.sqrt(width))
        nn.init.zeros_(self.inward.bias)
        positions = config.words + config.signal_tokens
        self.position = nn.Parameter(torch.randn(positions, inner) * 0.02 * scale)
        longest = max((_length(name, shape) for name, shape in condition_shapes.items()), default=0)
        vectors = [name for name, shape in condition_shapes.items() if not _length(name, shape)]
        num_more = max(longest - config.signal_tokens, 0) + len(vectors)
        self.more = nn.Parameter(torch.randn(num_more, inner) * scale)
        self.heads = nn.ModuleDict(
            {name: _head(name, shape, inner) for name, shape in condition_shapes.items()}
        )
        if config.condition_dropout:
            self.null = nn.ParameterDict(
                {name: nn.Parameter(torch.zeros(shape)) for name, shape in condition_shapes.items()}
            )

    def forward(self, signals: Tensor) -> dict[str, Tensor]:
        media = len(signals)
        layers = signals.reshape(media, -1, *self.shift.shape)  # [M, S, n, D]
        is_absent = (signals == 0).all(-1) if self.num_words else None  # [M, S]
        layers = F.rms_norm((layers - self.shift) * self.scale, layers.shape[-1:])
        x = self.inward(self._mix(layers)) + self.position
        x = torch.cat([x, self.more.expand(media, -1, -1)], dim=1)
        if is_absent is not None:
            is_absent = F.pad(is_absent, (0, len(self.more)))
        with short_attention(x, self.kernels):
            states = self.encode(x, is_absent)[:, self.num_words :]
        condition: dict[str, Tensor] = {}
        vectors = 0
        for name, shape in self.condition_shapes.items():
            if length := _length(name, shape):
                own = states[:, :length]
            else:
                vectors += 1
                own = states[:, -vectors]
            value: Tensor = self.heads[name](own)
            condition[name] = value.reshape(media, *shape)
        return self._tied(condition)

    def null_condition(self, num: int) -> dict[str, Tensor] | None:
        if not self.condition_dropout:
            return None
        return {name: value.expand(num, *value.shape) for name, value in self.null.items()}

    @property
    def is_new(self) -> bool:
        """Whether nothing has been measured or trained yet."""
        return bool((self.shift == 0).all() and (self.scale == 1).all())

    def layer_gates(self) -> dict[str, list[float]]:
        """Return the share of each of `llm_layers` in what is read at signal tokens and at words;
        empty where a single layer is read."""
        if len(self.llm_layers) < 2:
            return {}
        shares: Any = self.gates.detach().float().softmax(-1)
        rows: list[list[float]] = shares.tolist()
        return dict(zip(("signal tokens", "words"), rows, strict=False))

    @torch.no_grad()
    def standardize(self, signals: Tensor) -> None:
        """Standardise the channels of the states that are read, before the first step.

        Args:
            signals: float[M, S, n * D], states as `forward` gets them.
        """
        states = signals.flatten(0, 1)
        states = states[(states != 0).any(-1)].reshape(-1, *self.shift.shape).float()
        self.shift.copy_(states.mean(0))
        self.scale.copy_(1 / states.std(0).clamp_min(1e-6))

    @torch.no_grad()
    def start_at_captions(self, targets: Mapping[str, Tensor]) -> None:
        """Let the conditions of new heads begin around the mean of captions' embeddings, with their
        standard deviation.

        Args:
            targets: the captions' own conditions float[M, …] by name, of the heads that are new;
                those of unused positions are 0.
        """
        for name, target in targets.items():
            if name.endswith("mask"):
                continue
            rows = target.float().reshape(-1, self.condition_shapes[name][-1])
            rows = rows[(rows != 0).any(-1)]
            if len(rows) > 1:
                self._begin_head(name, rows)

    @torch.no_grad()
    def set_null_condition(self, condition: Mapping[str, Tensor]) -> None:
        """Begin the null condition as another one, such as that of the empty caption.

        Args:
            condition: float[1, …] by name. A mask without a position counts as one of all.
        """
        for name, value in condition.items():
            is_empty = name.endswith("mask") and not value.any()
            self.null[name].copy_(torch.ones_like(value[0]) if is_empty else value[0])

    def _begin_head(self, name: str, rows: Tensor) -> None:
        """Let a new head begin around captions' embeddings float[R, E]."""
        head: Any = self.heads[name]
        head.bias.copy_(rows.mean(0))
        head.weight.mul_(rows.std(0)[:, None])

    def _mix(self, layers: Tensor) -> Tensor:
        """Average the layers by their gates: float[M, S, n, D] -> float[M, S, D]."""
        if layers.shape[2] == 1:
            return layers[:, :, 0]
        shares = self.gates.softmax(-1)  # [1 or 2, n]
        words = shares[-1:].expand(self.num_words, -1)
        shares = torch.cat([words, shares[:1].expand(self.signal_tokens, -1)])  # [S, n]
        return torch.einsum("msnd,sn->msd", layers, shares)

    def encode(self, x: Tensor, is_absent: Tensor | None) -> Tensor:
        """Run the encoder in both directions.

        Args:
            x: float[M, T, d].
            is_absent: bool[M, T], positions that nothing attends to; None: none.

        Returns:
            float[M, T, d].
        """
        if isinstance(self.encoder, nn.TransformerEncoder):
            return self.encoder(x, src_key_padding_mask=is_absent)
        mask = None
        if is_absent is not None:
            mask = (~is_absent)[:, None, None].expand(-1, 1, x.shape[1], -1)
        return self.encoder(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state

    def _tied(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The condition, with a gradient of zero for the null condition, for which a distributed
        reducer would otherwise wait in steps that drop no condition."""
        if not self.condition_dropout:
            return condition
        return {name: value + 0.0 * self.null[name] for name, value in condition.items()}


def build(
    config: ConnectorConfig, *, condition_shapes: Mapping[str, tuple[int, ...]], width: int
) -> Connector:
    """Build the connector between an LLM's states and a decoder's condition.

    Args:
        config: the settings of the connector.
        condition_shapes: (P, E) of each tensor of the condition, or (E,) of a pooled one, by name.
        width: D, the width of the LLM's hidden states.

    Raises:
        ConfigError: a setting is out of range.
        CheckpointError: the language model that it starts from cannot be loaded.
    """
    check_config(config)
    return Connector(config, condition_shapes, width)


def check_config(config: ConnectorConfig) -> None:
    """Raise ConfigError where a setting is out of range."""
    if not 0 <= config.condition_dropout < 1:
        raise ConfigError(
            "output_projections: connector: condition_dropout: expected at least 0 and below 1, "
            f"got {config.condition_dropout:g}"
        )
    for name in ("signal_tokens", "layers"):
        if getattr(config, name) < 1:
            raise ConfigError(
                f"output_projections: connector: {name}: expected at least 1, got "
                f"{getattr(config, name)}"
            )
    if config.words < 0:
        raise ConfigError(
            f"output_projections: connector: words: expected 0 or more, got {config.words}"
        )


def _length(name: str, shape: tuple[int, ...]) -> int:
    """Positions of a sequence or of its mask; 0 for a pooled vector."""
    if name.endswith("mask"):
        return math.prod(shape)
    return math.prod(shape[:-1]) if len(shape) > 1 else 0


def _head(name: str, shape: tuple[int, ...], width: int) -> nn.Linear:
    """The linear map to one tensor. That to a mask begins with all positions used, and the loss
    `align` alone changes it."""
    if not name.endswith("mask"):
        head = nn.Linear(width, shape[-1])
        nn.init.normal_(head.weight, std=1 / math.sqrt(width))
        nn.init.zeros_(head.bias)
        return head
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.ones_(head.bias)
    return head


def _encoder(config: ConnectorConfig) -> tuple[nn.Module, int, float]:
    """The bidirectional encoder, its width, and the root mean square of what it reads."""
    if config.weights is not None:
        return _from_language_model(config, config.weights)
    if config.width % config.heads:
        raise ConfigError(
            f"output_projections: connector: width {config.width} is not a multiple of heads "
            f"{config.heads}"
        )
    layer = nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        config.feed_forward,
        config.dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    encoder = nn.TransformerEncoder(
        layer, config.layers, nn.LayerNorm(config.width), enable_nested_tensor=False
    )
    for module in encoder.modules():  # the copies of one layer would begin equal
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return encoder, config.width, 1.0


def _from_language_model(config: ConnectorConfig, weights: str) -> tuple[nn.Module, int, float]:
    """The first layers of a causal language model, without its mask and its embeddings."""
    from transformers import AutoConfig, AutoModel

    where = f"output_projections: connector: weights {quoted(weights)}"
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": locate(weights, where),
        "trust_remote_code": False,
    }
    configs: Any = AutoConfig
    models: Any = AutoModel
    is_meta = torch.get_default_device().type == "meta" or are_weights_skipped()
    quiet = quiet_libraries("transformers")  # the layers that are not used
    with wrap_errors(CheckpointError, f"{where} cannot be loaded"), remote_code_disabled(), quiet:
        whole: Any = configs.from_pretrained(**source).get_text_config()
        kinds: list[str] = list(getattr(whole, "layer_types", None) or ())
        odd = sorted(set(kinds) - _ATTENTION)
        if odd:
            raise ConfigError(
                f"{where}: layers of type {', '.join(odd)} read from left to right only; expected "
                "a model of attention layers alone"
            )
        if config.layers > whole.num_hidden_layers:
            raise ConfigError(
                f"{where}: it has {whole.num_hidden_layers} layers, but `layers` asks for "
                f"{config.layers}"
            )
        whole.num_hidden_layers = config.layers
        if kinds:
            whole.layer_types = kinds[: config.layers]
        whole.is_causal = False
        whole.attention_dropout = config.dropout
        scale = 1.0
        if is_meta:
            model = models.from_config(whole, attn_implementation="sdpa")
        else:
            model = models.from_pretrained(
                **source,
                config=whole,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
            )
            scale = model.get_input_embeddings().weight.square().mean().sqrt().item()
    model.set_input_embeddings(nn.Identity())
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model, whole.hidden_size, scale
