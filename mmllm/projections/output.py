"""Output projections: hidden states of signal tokens -> a diffusion decoder's condition. Trained.

Legend: M media, K signal tokens, D LLM width, d inner width, P x E one tensor of the condition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.errors import ConfigError
from mmllm.kernels.backend import UsesKernels, resolve_backend
from mmllm.kernels.short_attention import short_attention
from mmllm.projections.base import OutputProjection


@dataclass(frozen=True)
class TransformerConfig:
    """The paper's output projection (NExT-GPT, Wu et al. 2023, sec. 3.3 and its code): a linear
    map, an encoder-decoder transformer with learned queries, a linear map per tensor.

    The paper's sizes are the defaults: 31-32 M parameters for Stable Diffusion 1.5.

    Attributes:
        signal_tokens: K, the signal tokens of a medium.
        width: the width of the transformer, a multiple of `heads`.
        encoder_layers: layers of the encoder, over signal tokens.
        decoder_layers: layers of the decoder, over the queries.
        heads: attention heads.
        feed_forward: the width between the two layers of a feed-forward network.
        dropout: dropout in the transformer.
        bare: whether to leave out the norm and the positions, which the paper's code lacks.
    """

    signal_tokens: int = 4
    width: int = 512
    encoder_layers: int = 4
    decoder_layers: int = 4
    heads: int = 4
    feed_forward: int = 2048
    dropout: float = 0.0
    bare: bool = False


class TransformerProjection(UsesKernels, OutputProjection):
    """The transformer that `TransformerConfig` describes.

    One decoder predicts all tensors of the condition: a sequence [P, E] has P queries, a vector [E]
    has one. Queries are initialised randomly: equal queries would stay equal.
    """

    def __init__(
        self, config: TransformerConfig, condition_shapes: Mapping[str, tuple[int, ...]], width: int
    ):
        super().__init__(config.signal_tokens, condition_shapes)
        self.use_kernels(resolve_backend())
        inner = config.width
        if inner % config.heads:
            raise ConfigError(
                f"output projection: width {inner} is not a multiple of heads {config.heads}"
            )
        self.inward = nn.Linear(width, inner)
        self.bare = config.bare
        if not config.bare:
            self.norm = nn.LayerNorm(width)
            self.position = nn.Parameter(torch.randn(config.signal_tokens, inner) * 0.02)
        layer: dict[str, Any] = {
            "d_model": inner,
            "nhead": config.heads,
            "dim_feedforward": config.feed_forward,
            "dropout": config.dropout,
            "batch_first": True,
            "norm_first": True,
        }
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**layer),
            config.encoder_layers,
            nn.LayerNorm(inner),
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(**layer), config.decoder_layers, nn.LayerNorm(inner)
        )
        self.queries = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(_num_queries(shape), inner))
                for name, shape in self.condition_shapes.items()
            }
        )
        self.outward = nn.ModuleDict(
            {name: nn.Linear(inner, shape[-1]) for name, shape in self.condition_shapes.items()}
        )

    def forward(self, signals: Tensor) -> dict[str, Tensor]:
        media = signals.shape[0]
        memory = (
            self.inward(signals) if self.bare else self.inward(self.norm(signals)) + self.position
        )
        queries = [self.queries[name] for name in self.condition_shapes]
        with short_attention(signals, self.kernels):
            states = self.decoder(torch.cat(queries).expand(media, -1, -1), self.encoder(memory))
        parts = states.split([len(query) for query in queries], dim=1)  # one per tensor
        return {
            name: self.outward[name](part).reshape(media, *self.condition_shapes[name])
            for name, part in zip(self.condition_shapes, parts, strict=True)
        }


def build(
    config: TransformerConfig, *, condition_shapes: Mapping[str, tuple[int, ...]], width: int
) -> TransformerProjection:
    """Build the projection of signal hidden states to a decoder's condition.

    Args:
        config: the settings of the Transformer.
        condition_shapes: (P, E) of each tensor of the condition, or (E,) of a pooled one, by name.
        width: D, the width of the LLM's hidden states.
    """
    return TransformerProjection(config, condition_shapes, width)


def _num_queries(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])
