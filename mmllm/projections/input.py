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
    """One linear map per token: N = L (LLaVA, Liu et al. 2023, sec. 4.1)."""

    dropout: float = 0.0


@dataclass(frozen=True)
class MLPConfig:
    """Two layers per token: N = L (LLaVA-1.5, Liu et al. 2023, sec. 3.2)."""

    hidden: int = 1024
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


InputProjectionConfig = LinearConfig | MLPConfig | GroupingConfig | ResamplerConfig


class InputProjection(nn.Module):
    """float[M, L, C] (mask bool[M, L]) -> float[M, N, D]; M >= 1."""

    num_tokens: int
    """N"""

    def __init__(
        self,
        feature_shape: tuple[int, int],
        width: int,
        num_tokens: int,
        dropout: float,
        scale: float,
    ):
        super().__init__()
        length, channels = feature_shape
        self.num_tokens = num_tokens
        self.feature_shape = feature_shape
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
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
        return self.dropout(self.norm(features) + self.position)

    def finish(self, tokens: Tensor) -> Tensor:
        """To the scale of LLM embeddings: float[M, N, D] -> float[M, N, D]."""
        return F.rms_norm(tokens, tokens.shape[-1:]) * self.gain


class LinearProjection(InputProjection):
    def __init__(
        self, config: LinearConfig, feature_shape: tuple[int, int], width: int, scale: float
    ):
        super().__init__(feature_shape, width, feature_shape[0], config.dropout, scale)
        self.linear = nn.Linear(feature_shape[1], width)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.finish(self.linear(self.prepare(features)))


class MLPProjection(InputProjection):
    def __init__(self, config: MLPConfig, feature_shape: tuple[int, int], width: int, scale: float):
        super().__init__(feature_shape, width, feature_shape[0], config.dropout, scale)
        self.layers = nn.Sequential(
            nn.Linear(feature_shape[1], config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, width),
        )

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.finish(self.layers(self.prepare(features)))


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
