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

_SAME_TOKEN = 0.7
"""Least cosine of a token's embeddings before and after training. The next token's is at most 0.92
and 0.55 on average (mini); a random one's is 0.2."""


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
        # The LLM's ids of the vocabulary, -1 where there is none. They are not saved: `find_ids`.
        self.register_buffer("ids", torch.full((config.vocabulary,), -1), persistent=False)

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
        return self.classifier(self.states(features, mask))

    def states(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the classifier's input of every step.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.

        Returns:
            float[M, T, the width of the layers].
        """
        tokens = self.inward(self.prepare(features))
        padding = None if mask is None else ~mask
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens, memory_key_padding_mask=padding)
        return queries

    def spell(self, features: Tensor, mask: Tensor | None = None) -> list[tuple[int, ...]]:
        """Read off the LLM's token ids of each description.

        The ids are known once `set_vocabulary` or `find_ids` was called.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.
        """
        return self.read(self.scores(features, mask))

    def read(self, scores: Tensor) -> list[tuple[int, ...]]:
        """Read the LLM's token ids of each description off its scores.

        Args:
            scores: float[M, T, 1 + K], as `scores` returns them.
        """
        path = scores.argmax(-1)
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
        return ctc_loss(self.scores(features, mask), targets)

    @torch.no_grad()
    def set_vocabulary(self, ids: list[int], embeddings: Tensor) -> None:
        """Set the first tokens of the vocabulary.

        Args:
            ids: R ids of the LLM.
            embeddings: float[R, D], what the LLM embeds them as.
        """
        self.ids[: len(ids)] = torch.tensor(ids).to(self.ids)
        self.table[: len(ids)] = embeddings / self.gain

    @torch.no_grad()
    def find_ids(self, embeddings: Tensor) -> None:
        """Find out which tokens of the LLM the vocabulary of a trained projection holds: those
        whose embeddings point where its own do. Tokens that never got an embedding have none.

        Args:
            embeddings: float[V, D], all of the LLM's.
        """
        own = F.normalize(self.table * self.gain, dim=-1)
        cosine, ids = (own @ F.normalize(embeddings.to(own), dim=-1).T).max(-1)
        self.ids = torch.where(cosine > _SAME_TOKEN, ids, -1)

    @torch.no_grad()
    def add_vocabulary(self, ids: list[int], embeddings: Tensor) -> None:
        """Append tokens to the vocabulary; the others stay as they are.

        The classifier scores a new token as it scores the others on average until it is trained: at
        most as high as the best of them, so that nothing is spelled otherwise.

        Args:
            ids: R ids of the LLM.
            embeddings: float[R, D], what the LLM embeds them as.
        """
        self.vocabulary += len(ids)
        self.ids = torch.cat([self.ids, torch.tensor(ids).to(self.ids)])
        self.table = nn.Parameter(torch.cat([self.table, embeddings / self.gain]))
        old = self.classifier
        self.classifier = nn.Linear(old.in_features, 1 + self.vocabulary).to(old.weight)
        for now, before in zip(self.classifier.parameters(), old.parameters(), strict=True):
            now[: len(before)] = before
            now[len(before) :] = before[1:].mean(0)


def ctc_loss(scores: Tensor, targets: list[list[int]]) -> Tensor:
    """Compute the mean negative log-likelihood of descriptions, over all ways to say them.

    Args:
        scores: float[M, T, 1 + K] as `CTCProjection.scores` returns them.
        targets: for each medium the places of its tokens in the vocabulary.
    """
    logs = scores.float().log_softmax(-1).transpose(0, 1)  # [T, M, 1 + K]
    lengths = torch.tensor([len(target) for target in targets])
    flat = torch.tensor([1 + token for target in targets for token in target], dtype=torch.long)
    steps = torch.full_like(lengths, len(logs))
    return F.ctc_loss(logs, flat.to(logs.device), steps, lengths, zero_infinity=True)


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
