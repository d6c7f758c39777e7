"""Video -> tokens, by an image encoder on a few frames that are evenly spaced in time.

Legend: M media, N frames, L tokens and C channels of an image, S its sample shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmllm.conversation import Image, Video
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.errors import ConfigError
from mmllm.utils.hashing import fingerprint


@dataclass(frozen=True)
class FramesConfig:
    """Which image encoder, on how many frames."""

    modality: Literal["video"] = "video"
    encoder: Mapping[str, Any] = field(default_factory=lambda: {"type": "efficientnet"})
    """An image encoder as a system's `encoders` has it: its `type` and its keys."""
    frames: int = 5
    """N: the middles of so many equal parts of the video."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"frames: expected at least 1, got {self.frames}")


class FramesEncoder(ModalityEncoder):
    """float[M, N, *S] -> float[M, N * L, C], frame after frame. Its audio is ignored.

    The frame of a token follows from its position alone: the projection learns positions in time.
    """

    modality: ClassVar[str] = "video"

    def __init__(self, config: FramesConfig, image_encoder: ModalityEncoder) -> None:
        """`image_encoder` encodes single frames."""
        super().__init__()
        if image_encoder.modality != "image":
            raise ConfigError(
                "frames.encoder: expected an encoder of images, got one of "
                f"{image_encoder.modality}"
            )
        self.config = config
        self.image_encoder = image_encoder
        self.num_frames = config.frames
        tokens, channels = image_encoder.feature_shape
        self.sample_shape = (config.frames, *image_encoder.sample_shape)
        self.feature_shape = (config.frames * tokens, channels)
        self.freeze()

    @property
    def fingerprint(self) -> str:
        facts = ["frames", self.config.frames, "middles", self.image_encoder.fingerprint]
        return fingerprint(facts)

    def load(self) -> None:
        self.image_encoder.load()

    def to_tensor(self, medium: Video) -> Tensor:
        """A video -> float[N, *S]; a video of fewer frames repeats them."""

        frames = medium.sample_frames(self.config.frames)
        return torch.stack([self.image_encoder.preprocess(Image(array=frame)) for frame in frames])

    def forward(self, samples: Tensor) -> Features:
        """float[M, N, *S] -> float[M, N * L, C]."""
        features = self.image_encoder(samples.flatten(0, 1))  # [M * N, L, C]
        mask = features.mask
        if mask is not None:
            mask = mask.unflatten(0, samples.shape[:2]).flatten(1, 2)
        return Features(features.tokens.unflatten(0, samples.shape[:2]).flatten(1, 2), mask)


def build(config: FramesConfig) -> ModalityEncoder:
    """The frozen encoder with its image encoder inside. Raises ConfigError and AssetError."""
    from mmllm.config import build as build_component
    from mmllm.config import parse_component

    inner = parse_component("encoders", config.encoder, "frames.encoder")
    return FramesEncoder(config, build_component(inner))
