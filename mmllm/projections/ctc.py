"""Spelling: a medium's description in the language model's own tokens, read off by CTC.

Legend: M media, L encoder tokens, C encoder width, T steps, K tokens of the vocabulary, N tokens
per medium, U different tokens of names, D LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import ConfigError
from mmllm.projections.base import InputProjection, masked_mean

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

    A second, linear reader knows the names of whole things. It is taught by few examples, and reads
    single things in a style that training never had rightly more often than they are spelled
    rightly (mini: 0.73 of 351 images). What it recognises becomes the LLM's embeddings of that
    name; all else it leaves to be spelled.

    Attributes:
        num_tokens: N, at least the tokens of the longest description; the rest is one learned
            embedding.
        steps: T, at least N, and one more for each token that follows itself.
        vocabulary: K, at least the number of different tokens in the descriptions.
        width: the width of the transformer layers, a multiple of `heads`.
        heads: attention heads.
        layers: transformer layers.
        dropout: dropout of the features and in the layers.
        names: how many names the second reader knows; teaching adds them (`mmllm teach`).
    """

    num_tokens: int = 24
    steps: int = 32
    vocabulary: int = 1024
    width: int = 256
    heads: int = 4
    layers: int = 3
    dropout: float = 0.0
    names: int = 0


class CTCProjection(InputProjection):
    """The projection that `CTCConfig` describes.

    The choice of tokens is hard in the forward pass and soft in the backward pass
    (straight-through), as in `WordsProjection`. Names are taught, not trained: the gradient of
    their reader is zero.
    """

    vocabulary_type = "ctc"
    ids: Tensor
    namer: nn.Linear | None
    """Reads the mean feature as no name, the first class, or as one of the names."""
    name_ids: Tensor
    """int[names, N], the LLM's token ids of each name, then -1."""
    name_places: Tensor
    """int[names, N], the rows of `name_table`."""
    name_table: Tensor
    """float[U, D], the LLM's embeddings of the names' tokens."""

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
        self.forget_names()
        if config.names:
            self._set_names(self.name_ids.new_full((config.names, config.num_tokens), -1))

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
        tokens = (tokens + is_rest * self.rest) * self.gain
        return self._with_names(tokens, features, mask) if len(self.name_ids) else tokens

    def _with_names(self, tokens: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        """Replace the tokens float[M, N, D] of media that are recognised by those of their name."""
        scores = self.name_scores(features, mask)
        name = scores.argmax(-1)  # [M]
        index = (name - 1).clamp(min=0)
        named = self.name_table[self.name_places[index]].to(tokens)  # [M, N, D]
        is_rest = (self.name_ids[index] < 0)[..., None]
        named = torch.where(is_rest, self.rest * self.gain, named)
        tokens = torch.where((name > 0)[:, None, None], named, tokens)
        return tokens + 0 * scores.sum()  # a gradient of zero, or DDP would wait for one

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

    def mean_feature(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the input of the reader of names: it depends on no trained parameter.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.

        Returns:
            float[M, C].
        """
        return masked_mean(F.layer_norm(features, features.shape[-1:]), mask)

    def name_scores(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the logits of the names, of a projection that knows some.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.

        Returns:
            float[M, 1 + names]; the first is that of no name.
        """
        assert self.namer is not None
        return self.namer(self.mean_feature(features, mask))

    def spell(self, features: Tensor, mask: Tensor | None = None) -> list[tuple[int, ...]]:
        """Read off the LLM's token ids of each name or description.

        Those of descriptions are known once `set_vocabulary` or `find_ids` was called.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.
        """
        spelled = self.read(self.scores(features, mask))
        names = self.names()
        if not names:
            return spelled
        chosen = self.name_scores(features, mask).argmax(-1)
        return [
            names[int(name) - 1] if name else tokens
            for name, tokens in zip(chosen, spelled, strict=True)
        ]

    def names(self) -> list[tuple[int, ...]]:
        """Return the LLM's token ids of each name."""
        return [tuple(int(token) for token in row[row >= 0]) for row in self.name_ids]

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
    def add_names(self, names: Sequence[Sequence[int]], embed: Callable[[Tensor], Tensor]) -> None:
        """Append names; the others stay as they are.

        The reader scores a new name lower than it scores the others on average until it is trained,
        so that nothing is read otherwise.

        Args:
            names: the LLM's token ids of each name, 1 to N.
            embed: see `embed_names`.
        """
        added = self.name_ids.new_full((len(names), self.num_tokens), -1)
        for row, name in zip(added, names, strict=True):
            row[: len(name)] = torch.tensor(name).to(row)
        old = self.namer
        namer = self._set_names(torch.cat([self.name_ids, added]))
        if old is not None:
            for now, before in zip(namer.parameters(), old.parameters(), strict=True):
                now[: len(before)] = before
                now[len(before) :] += before.mean(0)
        self.embed_names(embed)

    def forget_names(self) -> None:
        """Know no names."""
        self.namer = None
        none = torch.full((0, self.num_tokens), -1, dtype=torch.int32, device=self.rest.device)
        self.register_buffer("name_ids", none, persistent=False)

    def embed_names(self, embed: Callable[[Tensor], Tensor]) -> None:
        """See InputProjection."""
        if len(self.name_ids):
            ids = self.name_ids.clamp(min=0).long()
            tokens = {0, *(token for name in self.names() for token in name)}
            used = torch.tensor(sorted(tokens), device=ids.device)
            self.name_places = torch.searchsorted(used, ids)
            self.name_table = embed(used)[:, : len(self.rest)].detach().to(self.table)

    @torch.no_grad()
    def _set_names(self, ids: Tensor) -> nn.Linear:
        """Know the names int[names, N]; until it is trained, the reader recognises none."""
        self.register_buffer("name_ids", ids)
        self.register_buffer("name_places", torch.zeros_like(ids).long(), persistent=False)
        self.register_buffer(
            "name_table", self.table.new_zeros(1, len(self.rest)), persistent=False
        )
        self.namer = nn.Linear(self.feature_shape[1], 1 + len(ids)).to(self.table)
        nn.init.zeros_(self.namer.weight)
        nn.init.zeros_(self.namer.bias)
        nn.init.constant_(self.namer.bias[1:], -1.0)
        return self.namer


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
