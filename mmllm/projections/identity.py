"""An input projection that changes nothing: for features that are embeddings of the language model
already (encoder `backbone`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmllm.errors import ConfigError
from mmllm.projections.base import InputProjection


@dataclass(frozen=True)
class IdentityConfig:
    """It has no settings."""


class IdentityProjection(InputProjection):
    """float[M, L, C] -> the same."""

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.prepare(features)


def build(
    config: IdentityConfig, *, feature_shape: tuple[int, int], width: int, scale: float = 1.0
) -> InputProjection:
    """Build the projection.

    Args:
        config: it has no settings.
        feature_shape: (L, C) of the encoder.
        width: D, the LLM's embedding width.
        scale: not used.

    Raises:
        ConfigError: the features are no embeddings of the language model.
    """
    length, channels = feature_shape
    if channels % width:
        raise ConfigError(
            f"input_projections: identity: expected features of width {width}, that of the "
            f"language model's embeddings, got {channels}; only encoders of type backbone have them"
        )
    return IdentityProjection(feature_shape, width, length, 0.0, scale, bare=True)
