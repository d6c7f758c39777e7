"""Clips -> tokens, by a picture encoder on a few frames that lie even in time.

Legend: M clips, N frames, L tokens and C channels of a picture, S its sample shape.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmllm.conversation import Image, Video
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class FramesConfig:
    """Which picture encoder, on how many frames."""

    modality: Literal["video"] = "video"
    encoder: Mapping[str, Any] = field(default_factory=lambda: {"type": "efficientnet"})
    """A picture encoder as a system's `encoders` has it: its `type` and its keys."""
    frames: int = 5
    """N: the middles of so many equal parts of the clip."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"frames: expected at least 1, got {self.frames}")


class FramesEncoder(ModalityEncoder):
    """float[M, N, *S] -> float[M, N * L, C], frame after frame. What is heard is not looked at.

    Which frame a token comes from is told by its place alone: positions in time are learned by
    the projection behind.
    """

    modality: ClassVar[str] = "video"

    def __init__(self, config: FramesConfig, picture: ModalityEncoder) -> None:
        """`picture` encodes single frames."""
        super().__init__()
        if picture.modality != "image":
            raise ConfigError(
                f"frames.encoder: expected an encoder of images, got one of {picture.modality}"
            )
        self.config = config
        self.picture = picture
        self.num_frames = config.frames
        tokens, channels = picture.feature_shape
        self.sample_shape = (config.frames, *picture.sample_shape)
        self.feature_shape = (config.frames * tokens, channels)
        self.freeze()

    @property
    def fingerprint(self) -> str:
        what = ["frames", self.config.frames, "middles", self.picture.fingerprint]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def _preprocess(self, medium: Video) -> Tensor:
        """A clip -> float[N, *S]; a clip of fewer frames repeats them."""
        from mmllm import media

        frames = media.sample_frames(medium, self.config.frames)
        return torch.stack([self.picture.preprocess(Image(array=frame)) for frame in frames])

    def forward(self, samples: Tensor) -> Features:
        """float[M, N, *S] -> float[M, N * L, C]."""
        features = self.picture(samples.flatten(0, 1))  # [M * N, L, C]
        mask = features.mask
        if mask is not None:
            mask = mask.unflatten(0, samples.shape[:2]).flatten(1, 2)
        return Features(features.tokens.unflatten(0, samples.shape[:2]).flatten(1, 2), mask)


def build(config: FramesConfig) -> ModalityEncoder:
    """The frozen encoder with its picture encoder inside. Raises ConfigError and AssetError."""
    from mmllm.config import build as build_component
    from mmllm.config import parse_component

    inner = parse_component("encoders", config.encoder, "frames.encoder")
    return FramesEncoder(config, build_component(inner))
