"""Data classes of a media file: MediaInfo of its header, and MediaContent of its decoded arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class MediaInfo:
    """The properties of a file according to its header; fields that do not apply are 0."""

    modality: str
    """"image", "audio" or "video"."""
    format: str
    """The format's name in the library that reads it: "PNG", "WAV", "matroska,webm"."""
    width: int = 0
    height: int = 0
    """Pixels."""
    frames: int = 0
    seconds: float = 0.0
    samples: int = 0
    sample_rate: int = 0
    """Hz; for a video, that of its audio track."""
    channels: int = 0
    by_av: bool = False
    """Whether the file is read by PyAV, not by Pillow or soundfile."""

    @property
    def decoded_bytes(self) -> int:
        """Size in bytes of the decoded array, including that of a video's audio track."""
        pixels = 3 * self.width * self.height * max(self.frames, 1)
        return pixels + 4 * self.samples * self.channels


@dataclass(frozen=True)
class MediaContent:
    """The decoded content of a file.

    Attributes:
        array: image: uint8[H, W, 3]; audio: float32[C, S] in [-1, 1]; video: uint8[F, H, W, 3].
        sample_rate: Hz; audio only.
        fps: frames per second; video only.
        audio: the audio track of a video, if there is one.
        provenance: how mmllm generated the file; None for other files.
    """

    array: np.ndarray
    sample_rate: int | None = None
    fps: float | None = None
    audio: MediaContent | None = None
    provenance: Mapping[str, Any] | None = None
