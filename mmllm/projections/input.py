"""Input projections: an encoder's features -> embeddings in the language model's space. Trained.

Legend: M media, L encoder tokens, C encoder width, N tokens per medium, D LLM width, H heads.
Every projection normalises the features, adds a learned position to each encoder token (a place in
an image, a time in video or audio), and scales its output to the RMS of the LLM's own embeddings,
so that the frozen LLM gets inputs of a familiar scale from the first step on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import ConfigError
from mmllm.projections.base import InputProjection, masked_mean


@dataclass(frozen=True)
class LinearConfig:
    """One linear map per token: N = L (LLaVA, Liu et al. 2023, sec. 4.1).

    Attributes:
        dropout: dropout of the features.
        bare: whether to leave out norm, positions and scale, for projections trained elsewhere.
    """

    dropout: float = 0.0
    bare: bool = False


@dataclass(frozen=True)
class MLPConfig:
    """Two layers per token: N = L (LLaVA-1.5, Liu et al. 2023, sec. 3.2).

    Attributes:
        hidden: the width between the layers.
        dropout: dropout of the features and between the layers.
        bare: whether to leave out norm, positions and scale, for projections trained elsewhere.
    """

    hidden: int = 1024
    dropout: float = 0.0
    bare: bool = False


@dataclass(frozen=True)
class WordsConfig:
    """Classify each medium into one of K learned words: a visual embedding table as in Ovis (Lu et
    al. 2024, sec. 3.1), but of the most probable word alone.

    What the LLM has learned about a word holds for every medium that is classified as that word,
    also in a style never trained on. For media that show one thing of a known vocabulary.

    Attributes:
        words: K. Pre-alignment assigns a word to each reply, so it must be at least the number of
            different replies about such media.
        num_tokens: N, the embeddings of a word.
        dropout: dropout of the features.
    """

    words: int = 512
    num_tokens: int = 3
    dropout: float = 0.0


@dataclass(frozen=True)
class GroupingConfig:
    """Concept tokens among which the features are divided (NExT-GPT, Wu et al. 2023, sec. 3.1;
    grouping block of GroupViT, Xu et al. 2022, sec. 3.2).

    Attributes:
        num_tokens: N, the number of concept tokens.
        width: the width of the transformer layers, a multiple of `heads`.
        heads: attention heads.
        layers: transformer layers.
        dropout: dropout of the features and in the layers.
    """

    num_tokens: int = 8
    width: int = 512
    heads: int = 8
    layers: int = 1
    dropout: float = 0.0


@dataclass(frozen=True)
class ResamplerConfig:
    """Perceiver resampler (Flamingo, Alayrac et al. 2022, sec. 3.1).

    Attributes:
        num_tokens: N, the number of learned queries.
        width: the width of the transformer layers, a multiple of `heads`.
        heads: attention heads.
        layers: transformer layers.
        dropout: dropout of the features and in the layers.
    """

    num_tokens: int = 8
    width: int = 512
    heads: int = 8
    layers: int = 2
    dropout: float = 0.0


InputProjectionConfig = LinearConfig | MLPConfig | WordsConfig | GroupingConfig | ResamplerConfig


class LinearProjection(InputProjection):
    """One linear map per token."""

    def __init__(
        self, config: LinearConfig, feature_shape: tuple[int, int], width: int, scale: float
    ):
        length = feature_shape[0]
        super().__init__(feature_shape, width, length, config.dropout, scale, bare=config.bare)
        self.linear = nn.Linear(feature_shape[1], width)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.finish(self.linear(self.prepare(features)))


class MLPProjection(InputProjection):
    """Two linear maps with a GELU, per token."""

    def __init__(self, config: MLPConfig, feature_shape: tuple[int, int], width: int, scale: float):
        length = feature_shape[0]
        super().__init__(feature_shape, width, length, config.dropout, scale, bare=config.bare)
        self.layers = nn.Sequential(
            nn.Linear(feature_shape[1], config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, width),
        )

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.finish(self.layers(self.prepare(features)))


class WordsProjection(InputProjection):
    """Choose one of K words by a linear classifier, averaged over the encoder's tokens.

    The choice is hard in the forward pass and soft in the backward pass (straight-through). The LLM
    handles mixtures of words badly: images of an unseen style, whose scores are flat, were named
    correctly 0.66 of the time as mixtures and 0.77 as words (mini, 176 items). `shared` is added to
    every word and works as a soft prompt.
    """

    vocabulary_type = "words"

    def __init__(
        self, config: WordsConfig, feature_shape: tuple[int, int], width: int, scale: float
    ):
        super().__init__(feature_shape, width, config.num_tokens, config.dropout, scale)
        self.words = config.words
        self.classifier = nn.Linear(feature_shape[1], config.words)
        self.table = nn.Parameter(torch.randn(config.words, config.num_tokens, width))
        self.shared = nn.Parameter(torch.zeros(config.num_tokens, width))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        soft = self.scores(features, mask).float().softmax(dim=-1)  # [M, K]
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
        chosen = (hard + soft - soft.detach()).to(self.table.dtype)  # straight-through
        word = torch.einsum("mk,knd->mnd", chosen, self.table)
        return (word + self.shared) * self.gain

    def scores(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the logits of the words.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.

        Returns:
            float[M, K], averaged over the tokens that count.
        """
        return masked_mean(self.classifier(self.prepare(features)), mask)

    def mean_feature(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the classifier's input, averaged over encoder tokens.

        The classifier is linear, so its logits of the mean are the mean of its logits.

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.

        Returns:
            float[M, C].
        """
        return masked_mean(self.prepare(features), mask)

    @torch.no_grad()
    def set_words(self, embeddings: Tensor) -> None:
        """Set the first R words to these embeddings of the LLM: float[R, N, D]."""
        self.table[: len(embeddings)] = embeddings / self.gain

    @torch.no_grad()
    def add_words(self, embeddings: Tensor) -> int:
        """Append words that say these embeddings of the LLM, and have the classifier score them low
        until it is trained: float[R, N, D].

        Returns:
            The index of the first new word; the words before it are as they were.
        """
        first, old = len(self.table), self.classifier
        self.words = first + len(embeddings)
        self.table = nn.Parameter(torch.cat([self.table, embeddings / self.gain]))
        self.classifier = nn.Linear(old.in_features, self.words).to(old.weight)
        self.classifier.weight[:first], self.classifier.bias[:first] = old.weight, old.bias
        self.classifier.weight[first:] = 0.0
        self.classifier.bias[first:] = old.bias.mean()
        return first


class TokenPool(InputProjection):
    """Base of projections from L encoder tokens to N learned queries, by transformer layers.

    Subclasses name the parameter that holds the queries and the kind of layer, and write `pool`.
    """

    queries_name: str
    layer_class: type[nn.TransformerEncoderLayer] | type[nn.TransformerDecoderLayer]

    def __init__(
        self,
        config: GroupingConfig | ResamplerConfig,
        feature_shape: tuple[int, int],
        width: int,
        scale: float,
    ):
        super().__init__(feature_shape, width, config.num_tokens, config.dropout, scale)
        inner = config.width
        if inner % config.heads:
            name = type(config).__name__.removesuffix("Config").lower()
            raise ConfigError(f"{name}: width {inner} is not a multiple of heads {config.heads}")
        self.inward = nn.Linear(feature_shape[1], inner)
        self.register_parameter(
            self.queries_name, nn.Parameter(torch.randn(config.num_tokens, inner))
        )
        self.layers = nn.ModuleList(
            self.layer_class(
                inner,
                config.heads,
                4 * inner,
                config.dropout,
                "gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.build_pool(inner)
        self.outward = nn.Linear(inner, width)

    def build_pool(self, inner: int) -> None:
        """Create the modules that `pool` needs besides the layers."""

    def pool(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Reduce the L encoder tokens of a medium to N tokens of the same width.

        Args:
            queries: float[M, N, I], learned.
            tokens: float[M, L, I].
            mask: bool[M, L], True for tokens that count; None: all.

        Returns:
            float[M, N, I].
        """
        raise NotImplementedError

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.inward(self.prepare(features))  # [M, L, I]
        queries = self.get_parameter(self.queries_name).expand(features.shape[0], -1, -1)
        return self.finish(self.outward(self.pool(queries, tokens, mask)))


class GroupingProjection(TokenPool):
    """Concept tokens and encoder tokens attend to each other; then each encoder token is assigned
    to one concept (hard in the forward pass, soft in the backward pass), and the mean of its tokens
    is added to each concept."""

    queries_name = "concepts"
    layer_class = nn.TransformerEncoderLayer

    def build_pool(self, inner: int) -> None:
        self.key = nn.Linear(inner, inner)
        self.query = nn.Linear(inner, inner)
        self.value = nn.Linear(inner, inner)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(inner), nn.Linear(inner, 4 * inner), nn.GELU(), nn.Linear(4 * inner, inner)
        )

    def pool(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        length = tokens.shape[1]
        joined: Tensor = torch.cat([queries, tokens], dim=1)
        padding = None if mask is None else F.pad(~mask, (self.num_tokens, 0), value=False)
        for layer in self.layers:
            joined = layer(joined, src_key_padding_mask=padding)
        concepts, tokens = torch.split(joined, [self.num_tokens, length], dim=1)

        scores = self.query(concepts) @ self.key(tokens).transpose(1, 2)  # [M, N, L]
        soft = (scores.float() / concepts.shape[-1] ** 0.5).softmax(dim=1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
        assignment = hard + soft - soft.detach()  # straight-through
        if mask is not None:
            assignment = assignment * mask[:, None, :]
        weights = assignment / assignment.sum(dim=-1, keepdim=True).clamp_min(1.0)
        concepts = concepts + (weights.to(tokens.dtype) @ self.value(tokens))
        return concepts + self.feed_forward(concepts)


class ResamplerProjection(TokenPool):
    """N learned latents attend to each other and to the encoder tokens, layer by layer."""

    queries_name = "latents"
    layer_class = nn.TransformerDecoderLayer

    def pool(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        padding = None if mask is None else ~mask
        for layer in self.layers:
            queries = layer(queries, tokens, memory_key_padding_mask=padding)
        return queries


_CLASSES: dict[type, type] = {
    LinearConfig: LinearProjection,
    MLPConfig: MLPProjection,
    WordsConfig: WordsProjection,
    GroupingConfig: GroupingProjection,
    ResamplerConfig: ResamplerProjection,
}


def build(
    config: InputProjectionConfig, *, feature_shape: tuple[int, int], width: int, scale: float = 1.0
) -> InputProjection:
    """Build the projection of an encoder's features to embeddings of the LLM.

    Args:
        config: the kind of projection and its settings.
        feature_shape: (L, C) of the encoder.
        width: D, the LLM's embedding width.
        scale: the root mean square of the LLM's embeddings, which initial outputs match.

    Raises:
        ConfigError: the settings do not fit the encoder's shape.
    """
    return _CLASSES[type(config)](config, feature_shape, width, scale)
