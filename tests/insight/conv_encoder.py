"""A small convolutional encoder of each modality, and pictures with and without a spot."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmllm.conversation import Image, Medium
from mmllm.encoders.base import Features, ModalityEncoder

SIDE = 16


class ConvEncoder(ModalityEncoder):
    """Four convolutions over a picture, over each of three frames, or over time and frequency."""

    def __init__(self, modality: str):
        super().__init__()
        self.modality = modality  # pyright: ignore[reportAttributeAccessIssue]
        self.num_frames = 3 if modality == "video" else None
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, stride=1) for _ in range(4))
        self.freeze()

    def to_tensor(self, medium: Any) -> Tensor:
        if self.modality == "video":
            frames = medium.sample_frames(3)
            return torch.stack([_pixels(frame) for frame in frames])
        if self.modality == "image":
            return _pixels(medium.to_numpy())
        wave = torch.from_numpy(medium.to_numpy()[0].copy())[: SIDE * 64].view(1, SIDE, 64)
        return wave[..., ::8].expand(3, -1, -1)  # [3, time, "frequency"]

    def forward(self, samples: Tensor) -> Features:
        x = samples.flatten(0, 1) if self.modality == "video" else samples
        for block in self.blocks:
            x = block(x)
        return Features(x.flatten(2).transpose(1, 2))

    @property
    def fingerprint(self) -> str:
        return f"conv-{self.modality}"


def _pixels(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)


def pictures(num: int, seed: int = 0) -> list[Medium]:
    draw = np.random.default_rng(seed)
    base = np.random.default_rng(9).integers(0, 200, (SIDE, SIDE, 3))
    arrays = [(base + draw.integers(0, 8, base.shape)).astype(np.uint8) for _ in range(num)]
    return [Image.from_numpy(array) for array in arrays]


def with_a_spot(picture: Medium) -> Image:
    array = picture.to_numpy().copy()
    array[10:13, 3:6] = (255, 0, 255)
    return Image.from_numpy(array)
