"""The contract of frozen modality encoders: media in, a grid of feature tokens out.

Legend: M media, S sample shape, L tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmllm.conversation import MEDIA, Medium
from mmllm.errors import MediaError
from mmllm.media.preparing import preparing


@dataclass(frozen=True)
class Features:
    """What an encoder says of M media: `tokens` float[M, L, C], `mask` bool[M, L] or None (all)."""

    tokens: Tensor
    mask: Tensor | None = None


class ModalityEncoder(nn.Module):
    """A frozen encoder of one modality. Subclasses are built from their own `Config`."""

    modality: ClassVar[str]
    """What it reads: "image", "audio" or "video"."""
    sample_shape: tuple[int, ...]
    """S: the shape of one preprocessed medium."""
    feature_shape: tuple[int, int]
    """(L, C): tokens per medium and their width."""
    num_frames: int | None = None
    """How many frames of a clip it looks at (`media.sample_frames`), for one that reads clips: who
    decodes them elsewhere, beforehand, decodes no others."""

    def preprocess(self, medium: Medium) -> Tensor:
        """A medium -> float[*S]; on the CPU, in data workers; raises MediaError."""
        name, expected = type(self).__module__.rpartition(".")[2], MEDIA[self.modality]
        if not isinstance(medium, expected):
            raise MediaError(f"{name}: expected {expected.__name__}, got {medium!r}")
        with preparing(medium, name):
            return self._preprocess(medium)

    def _preprocess(self, medium: Any) -> Tensor:
        """A medium of this modality -> float[*S]; what it raises is a MediaError outside."""
        raise NotImplementedError

    def forward(self, samples: Tensor) -> Features:
        """float[M, *S] -> Features of float[M, L, C]; M >= 1."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Component, weights, preprocessing and layer: equal fingerprints give equal features."""
        raise NotImplementedError

    def freeze(self) -> ModalityEncoder:
        """Weights that never train and layers that never see a batch statistic."""
        return self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, media: list[Medium]) -> Features:
        """Preprocess and encode a list of media at once."""
        device = next(self.parameters()).device
        return self(torch.stack([self.preprocess(medium) for medium in media]).to(device))


class UnloadedEncoder(ModalityEncoder):
    """What is left of an encoder whose weights were let go: what it was, and no answers."""

    def __init__(self, encoder: ModalityEncoder):
        super().__init__()
        self.modality = encoder.modality  # pyright: ignore[reportAttributeAccessIssue]
        self.sample_shape = encoder.sample_shape
        self.feature_shape = encoder.feature_shape
        self._fingerprint = encoder.fingerprint

    @property
    def fingerprint(self) -> str:
        return self._fingerprint
