"""Input projections: an encoder's features -> embeddings in the language model's space. Trained.

Legend: M media, L encoder tokens, C encoder width, N tokens per medium, D LLM width, H heads.
Every projection normalises the features, adds a learned position to each encoder token (place in
a picture, time in a clip or a sound), and ends at the scale of the LLM's own embeddings, so that
the frozen LLM sees something of a familiar size from the first step on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import ConfigError


@dataclass(frozen=True)
class LinearConfig:
    """One linear map per token: N = L (LLaVA, Liu et al. 2023, sec. 4.1). `bare`: the map alone,
    as others trained it: no norm, no positions, no scale."""

    dropout: float = 0.0
    bare: bool = False


@dataclass(frozen=True)
class MLPConfig:
    """Two layers per token: N = L (LLaVA-1.5, Liu et al. 2023, sec. 3.2). `bare`: see `linear`."""

    hidden: int = 1024
    dropout: float = 0.0
    bare: bool = False


@dataclass(frozen=True)
class WordsConfig:
    """Media as learned words, after the visual words with an embedding table of their own of Ovis
    (Lu et al. 2024, sec. 3.1), but the likeliest word alone: N = num_tokens.

    Each medium is one of `words` words, each word `num_tokens` embeddings. What the LLM has learned
    of a word holds for every medium that is read as that word, in a style never trained on too.
    Pre-alignment gives each reply its word, so `words` is at least the number of different replies
    about such media. For media that show one thing of a known vocabulary.
    """

    words: int = 512
    num_tokens: int = 3
    dropout: float = 0.0


@dataclass(frozen=True)
class GroupingConfig:
    """Concept tokens that divide the features among themselves (NExT-GPT, Wu et al. 2023, sec. 3.1;
    grouping block of GroupViT, Xu et al. 2022, sec. 3.2): N = num_tokens."""

    num_tokens: int = 8
    width: int = 512
    heads: int = 8
    layers: int = 1
    dropout: float = 0.0


@dataclass(frozen=True)
class ResamplerConfig:
    """Perceiver resampler (Flamingo, Alayrac et al. 2022, sec. 3.1): N = num_tokens."""

    num_tokens: int = 8
    width: int = 512
    heads: int = 8
    layers: int = 2
    dropout: float = 0.0


InputProjectionConfig = LinearConfig | MLPConfig | WordsConfig | GroupingConfig | ResamplerConfig


class InputProjection(nn.Module):
    """float[M, L, C] (mask bool[M, L]) -> float[M, N, D]; M >= 1."""

    num_tokens: int
    """N"""
    words: int | None = None
    """K, of a projection that reads a medium as one of its words."""

    def __init__(
        self,
        feature_shape: tuple[int, int],
        width: int,
        num_tokens: int,
        dropout: float,
        scale: float,
        *,
        bare: bool = False,
    ):
        super().__init__()
        length, channels = feature_shape
        self.num_tokens = num_tokens
        self.feature_shape = feature_shape
        self.dropout = nn.Dropout(dropout)
        self.bare = bare
        if not bare:
            self.norm = nn.LayerNorm(channels)
            self.position = nn.Parameter(torch.zeros(length, channels))
            self.gain = nn.Parameter(torch.full((width,), float(scale)))

    def prepare(self, features: Tensor) -> Tensor:
        """Check, normalise and place: float[M, L, C] -> float[M, L, C]."""
        if features.shape[1:] != torch.Size(self.feature_shape):
            raise ValueError(
                f"input projection: expected features [M, {self.feature_shape[0]}, "
                f"{self.feature_shape[1]}], got {list(features.shape)}; was it trained with "
                "another encoder?"
            )
        return self.dropout(features if self.bare else self.norm(features) + self.position)

    def finish(self, tokens: Tensor) -> Tensor:
        """To the scale of LLM embeddings: float[M, N, D] -> float[M, N, D]."""
        return tokens if self.bare else F.rms_norm(tokens, tokens.shape[-1:]) * self.gain


class LinearProjection(InputProjection):
    def __init__(
        self, config: LinearConfig, feature_shape: tuple[int, int], width: int, scale: float
    ):
        length = feature_shape[0]
        super().__init__(feature_shape, width, length, config.dropout, scale, bare=config.bare)
        self.linear = nn.Linear(feature_shape[1], width)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.finish(self.linear(self.prepare(features)))


class MLPProjection(InputProjection):
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
    """A linear classifier over K words, averaged over the encoder's tokens, chooses one.

    The choice is hard in the forward pass and soft in the backward pass. Mixtures of words are read
    badly: pictures of an unseen style, whose scores are flat, were named right 0.66 of the time as
    mixtures and 0.77 as words (mini, 176 items). What is `shared` is added to every word and works
    as a soft prompt ("this is what I see").
    """

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
        """Logits of the words: float[M, L, C] -> float[M, K]."""
        scores = self.classifier(self.prepare(features))  # [M, L, K]
        if mask is None:
            return scores.mean(dim=1)
        weights = mask.to(scores.dtype)[..., None]
        return (scores * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)

    @torch.no_grad()
    def set_words(self, embeddings: Tensor) -> None:
        """The first R words say these embeddings of the LLM: float[R, N, D]."""
        self.table[: len(embeddings)] = embeddings / self.gain


class GroupingProjection(InputProjection):
    """Concept tokens and features talk in transformer layers; then each feature token is given
    to one concept (hard in the forward pass, soft in the backward pass), and each concept
    becomes the mean of what it was given, added to itself."""

    def __init__(
        self, config: GroupingConfig, feature_shape: tuple[int, int], width: int, scale: float
    ):
        super().__init__(feature_shape, width, config.num_tokens, config.dropout, scale)
        _check_heads("grouping", config.width, config.heads)
        inner = config.width
        self.inward = nn.Linear(feature_shape[1], inner)
        self.concepts = nn.Parameter(torch.randn(config.num_tokens, inner))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
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
        self.key = nn.Linear(inner, inner)
        self.query = nn.Linear(inner, inner)
        self.value = nn.Linear(inner, inner)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(inner), nn.Linear(inner, 4 * inner), nn.GELU(), nn.Linear(4 * inner, inner)
        )
        self.outward = nn.Linear(inner, width)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        media, length = features.shape[:2]
        tokens = self.inward(self.prepare(features))  # [M, L, I]
        concepts = self.concepts.expand(media, -1, -1)  # [M, N, I]
        joined = torch.cat([concepts, tokens], dim=1)
        hidden = None if mask is None else F.pad(~mask, (self.num_tokens, 0), value=False)
        for layer in self.layers:
            joined = layer(joined, src_key_padding_mask=hidden)
        concepts, tokens = joined.split([self.num_tokens, length], dim=1)

        scores = self.query(concepts) @ self.key(tokens).transpose(1, 2)  # [M, N, L]
        soft = (scores.float() / concepts.shape[-1] ** 0.5).softmax(dim=1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
        assignment = hard + soft - soft.detach()  # straight-through
        if mask is not None:
            assignment = assignment * mask[:, None, :]
        share = assignment / assignment.sum(dim=-1, keepdim=True).clamp_min(1.0)
        concepts = concepts + (share.to(tokens.dtype) @ self.value(tokens))
        concepts = concepts + self.feed_forward(concepts)
        return self.finish(self.outward(concepts))


class ResamplerProjection(InputProjection):
    """N learned latents look at the features and at each other, layer by layer."""

    def __init__(
        self, config: ResamplerConfig, feature_shape: tuple[int, int], width: int, scale: float
    ):
        super().__init__(feature_shape, width, config.num_tokens, config.dropout, scale)
        _check_heads("resampler", config.width, config.heads)
        inner = config.width
        self.inward = nn.Linear(feature_shape[1], inner)
        self.latents = nn.Parameter(torch.randn(config.num_tokens, inner))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
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
        self.outward = nn.Linear(inner, width)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.inward(self.prepare(features))
        latents = self.latents.expand(features.shape[0], -1, -1)
        hidden = None if mask is None else ~mask
        for layer in self.layers:
            latents = layer(latents, tokens, memory_key_padding_mask=hidden)
        return self.finish(self.outward(latents))


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
    """The projection from an encoder's (L, C) to LLM width D; `scale`: RMS of LLM embeddings."""
    return _CLASSES[type(config)](config, feature_shape, width, scale)


def _check_heads(name: str, width: int, heads: int) -> None:
    if width % heads:
        raise ConfigError(f"{name}: width {width} is not a multiple of heads {heads}")
