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
from mmllm.media.preprocessing import preprocessing


@dataclass(frozen=True)
class Features:
    """The output of an encoder for M media."""

    tokens: Tensor
    """float[M, L, C]"""
    mask: Tensor | None = None
    """bool[M, L], False at padding; None: no padding."""


class ModalityEncoder(nn.Module):
    """A frozen encoder of one modality.

    A family sets the attributes, writes `to_tensor`, `forward` and `fingerprint`, and is built from
    a config dataclass of its own; see docs/encoders.md. Encoders with public weights derive from
    the bases in mmllm.encoders.pretrained.
    """

    modality: ClassVar[str]
    """What it encodes: "image", "audio" or "video"."""
    sample_shape: tuple[int, ...]
    """S: the shape of one preprocessed medium."""
    feature_shape: tuple[int, int]
    """(L, C): tokens per medium and their width."""
    num_frames: int | None = None
    """How many frames of a video it uses (`Video.sample_frames`): decoding beforehand may be
    limited to them. None for other modalities."""

    needs_whole_video: bool = False
    """Whether it reads a video's length, all of its frames or its track, so that a video has to be
    decoded whole beforehand."""

    def preprocess(self, medium: Medium) -> Tensor:
        """Convert a medium to one sample, on the CPU, in data workers.

        Args:
            medium: a medium of the encoder's modality.

        Returns:
            float[*S].

        Raises:
            MediaError: the medium has another modality, or cannot be read or converted.
        """
        name, expected = type(self).__module__.rpartition(".")[2], MEDIA[self.modality]
        if not isinstance(medium, expected):
            raise MediaError(f"{name}: expected {expected.__name__}, got {medium!r}")
        with preprocessing(medium, name):
            return self.to_tensor(medium)

    def to_tensor(self, medium: Any) -> Tensor:
        """Convert a medium to one sample; a family writes this. Any exception becomes a MediaError.

        Args:
            medium: a medium of the encoder's modality, decoded on first use.

        Returns:
            float[*S].
        """
        raise NotImplementedError

    def forward(self, samples: Tensor) -> Features:
        """Compute the features of a batch of samples; a family writes this.

        Args:
            samples: float[M, *S] of M >= 1 media, on the encoder's device.

        Returns:
            Features with tokens float[M, L, C].
        """
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """The hash of the component, weights, preprocessing and layer: encoders of equal
        fingerprints compute equal features, and share cached ones."""
        raise NotImplementedError

    layout: Any = None
    """Of an encoder whose media take as many tokens as each of them needs, which come first in a
    row, or stand in prompts as the language model's own processor writes them: the fields of
    mmllm.data.media_layout.MediaLayout."""

    def attach(self, llm: Any) -> None:
        """Take what the encoder shares with the language model; called before its shapes are read.
        Raises ConfigError and AssetError."""

    def load(self) -> None:
        """Read the weights now, where they would be read on first use. Raises AssetError."""

    def freeze(self) -> ModalityEncoder:
        """Disable gradients of the weights, and put layers in evaluation mode."""
        return self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, media: list[Medium]) -> Features:
        """Preprocess and encode a batch of media.

        Args:
            media: M >= 1 media of the encoder's modality.

        Returns:
            Features with tokens float[M, L, C], on the encoder's device.

        Raises:
            MediaError: a medium cannot be read.
        """
        self.load()
        samples = torch.stack([self.preprocess(medium) for medium in media])
        like = next(self.parameters(), samples)
        return self(samples.to(like.device))


class UnloadedEncoder(ModalityEncoder):
    """The description of an encoder whose weights were released: it cannot encode."""

    def __init__(self, encoder: ModalityEncoder):
        super().__init__()
        self.modality = encoder.modality  # pyright: ignore[reportAttributeAccessIssue]
        self.sample_shape = encoder.sample_shape
        self.feature_shape = encoder.feature_shape
        self.needs_whole_video = encoder.needs_whole_video
        self._fingerprint = encoder.fingerprint

    @property
    def fingerprint(self) -> str:
        return self._fingerprint
