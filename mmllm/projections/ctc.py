"""Spelling: a medium's description in the language model's own tokens, read off by CTC.

Legend: M media, L encoder tokens, C encoder width, T steps, K tokens of the vocabulary, N tokens
per medium, D LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import ConfigError
from mmllm.projections.base import InputProjection


@dataclass(frozen=True)
class CTCConfig:
    """Spell what a medium shows, in tokens of the LLM: T learned queries read the encoder's tokens,
    each says one token of a small vocabulary or nothing, and what repeats counts once (CTC, Graves
    et al. 2006, sec. 3).

    The LLM reads words that it knows, in an order that says how things belong together, so that
    what it has learned about text holds for media. For media with several things, attributes and
    places; pre-alignment learns the replies about such media (docs/training.md).

    Attributes:
        num_tokens: N, at least the tokens of the longest description; the rest is one learned
            embedding.
        steps: T, at least N, and one more for each token that follows itself.
        vocabulary: K, at least the number of different tokens in the descriptions.
        width: the width of the transformer layers, a multiple of `heads`.
        heads: attention heads.
        layers: transformer layers.
        dropout: dropout of the features and in the layers.
    """

    num_tokens: int = 24
    steps: int = 32
    vocabulary: int = 1024
    width: int = 256
    heads: int = 4
    layers: int = 3
    dropout: float = 0.0


class CTCProjection(InputProjection):
    """The projection that `CTCConfig` describes.

    The choice of tokens is hard in the forward pass and soft in the backward pass
    (straight-through), as in `WordsProjection`.
    """

    vocabulary_type = "ctc"
    ids: Tensor

    def __init__(self, config: CTCConfig, feature_shape: tuple[int, int], width: int, scale: float):
        super().__init__(feature_shape, width, config.num_tokens, config.dropout, scale)
        self.vocabulary = config.vocabulary
        self.inward = nn.Linear(feature_shape[1], config.width)
        self.queries = nn.Parameter(torch.randn(config.steps, config.width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                config.width,
                config.heads,
                4 * config.width,
                config.dropout,
                "gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.classifier = nn.Linear(config.width, 1 + config.vocabulary)  # the first is: nothing
        self.table = nn.Parameter(torch.randn(config.vocabulary, width))
        self.rest = nn.Parameter(torch.zeros(width))
        # The LLM's ids of the vocabulary, -1 where there is none; a float so that it is saved.
        self.register_buffer("ids", torch.full((config.vocabulary,), -1.0))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        soft = self.scores(features, mask).float().softmax(-1)  # [M, T, 1 + K]
        path = soft.argmax(-1)
        place = places(path, self.num_tokens)  # [M, T]
        hard = F.one_hot(path, soft.shape[-1]).to(soft)
        chosen = (hard + soft - soft.detach())[..., 1:].to(self.table.dtype)  # straight-through
        spoken = chosen @ self.table  # [M, T, D]
        moved = F.one_hot(place, 1 + self.num_tokens)[..., :-1].to(spoken)  # [M, T, N]
        tokens = moved.transpose(1, 2) @ spoken
        is_rest = moved.sum(1)[..., None] == 0  # [M, N, 1]
        return (tokens + is_rest * self.rest) * self.gain

    def scores(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the logits of every step.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.

        Returns:
            float[M, T, 1 + K]; the first is that of saying nothing.
        """
        tokens = self.inward(self.prepare(features))
        padding = None if mask is None else ~mask
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens, memory_key_padding_mask=padding)
        return self.classifier(queries)

    def spell(self, features: Tensor, mask: Tensor | None = None) -> list[tuple[int, ...]]:
        """Read off the LLM's token ids of each description.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.
        """
        path = self.scores(features, mask).argmax(-1)
        place = places(path, self.num_tokens)
        spelled = [
            self.ids[row[at < self.num_tokens] - 1] for row, at in zip(path, place, strict=True)
        ]
        return [tuple(int(token) for token in tokens) for tokens in spelled]

    def loss(self, features: Tensor, mask: Tensor | None, targets: list[list[int]]) -> Tensor:
        """Compute the mean negative log-likelihood of descriptions, over all ways to say them.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.
            targets: for each medium the places of its tokens in the vocabulary.
        """
        logs = self.scores(features, mask).float().log_softmax(-1).transpose(0, 1)  # [T, M, 1 + K]
        lengths = torch.tensor([len(target) for target in targets])
        flat = torch.tensor([1 + token for target in targets for token in target])
        steps = torch.full_like(lengths, len(logs))
        return F.ctc_loss(logs, flat.to(logs.device), steps, lengths, zero_infinity=True)

    @torch.no_grad()
    def set_vocabulary(self, ids: list[int], embeddings: Tensor) -> None:
        """Set the first tokens of the vocabulary.

        Args:
            ids: R ids of the LLM.
            embeddings: float[R, D], what the LLM embeds them as.
        """
        self.ids[: len(ids)] = torch.tensor(ids).to(self.ids)
        self.table[: len(ids)] = embeddings / self.gain


def places(path: Tensor, num_tokens: int) -> Tensor:
    """Where each step's token stands in the description, N where the step adds none.

    Args:
        path: int[M, T], what each step says; 0 is nothing.
        num_tokens: N; what comes after so many tokens is cut.

    Returns:
        int[M, T].
    """
    before = F.pad(path, (1, 0))[:, :-1]
    adds = (path != 0) & (path != before)
    return torch.where(adds, adds.cumsum(1) - 1, num_tokens).clamp(max=num_tokens)


def build(
    config: CTCConfig, *, feature_shape: tuple[int, int], width: int, scale: float = 1.0
) -> CTCProjection:
    """Build the projection of an encoder's features to tokens of the LLM.

    Args:
        config: the settings.
        feature_shape: (L, C) of the encoder.
        width: D, the LLM's embedding width.
        scale: the root mean square of the LLM's embeddings.

    Raises:
        ConfigError: a setting is out of range.
    """
    if config.width % config.heads:
        raise ConfigError(f"ctc: width {config.width} is not a multiple of heads {config.heads}")
    if config.steps < config.num_tokens:
        raise ConfigError(
            f"ctc: steps: expected at least num_tokens, {config.num_tokens}, got {config.steps}"
        )
    return CTCProjection(config, feature_shape, width, scale)
