"""What a media file is, by its header, and what it holds, decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class MediaInfo:
    """What a file's header says; fields that a modality does not have are 0."""

    modality: str
    """"image", "audio" or "video"."""
    format: str
    """As the library that reads it names it: "PNG", "WAV", "matroska,webm"."""
    width: int = 0
    height: int = 0
    """Pixels."""
    frames: int = 0
    seconds: float = 0.0
    samples: int = 0
    sample_rate: int = 0
    """Hz; of a video, that of its audio track."""
    channels: int = 0
    by_av: bool = False
    """Read by PyAV, not by Pillow or soundfile."""

    @property
    def decoded_bytes(self) -> int:
        """Size of the decoded array, and of a video's decoded audio track."""
        pixels = 3 * self.width * self.height * max(self.frames, 1)
        return pixels + 4 * self.samples * self.channels


@dataclass(frozen=True)
class MediaContent:
    """The decoded content of a file.

    array: uint8[H, W, 3] of an image; float32[C, S] in [-1, 1] of audio; uint8[F, H, W, 3] of a
        video.
    sample_rate: Hz, of audio.
    fps: frames per second, of a video.
    audio: the audio track of a video, if there is one.
    provenance: what made the file, if mmllm did.
    """

    array: np.ndarray
    sample_rate: int | None = None
    fps: float | None = None
    audio: MediaContent | None = None
    provenance: Mapping[str, Any] | None = None
