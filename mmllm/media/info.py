"""What a file is, by its header."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MediaInfo:
    """What a header tells; what a modality does not have is 0."""

    modality: str
    """"image", "audio" or "video"."""
    format: str
    """In the words of the library that reads it: "PNG", "WAV", "matroska,webm"."""
    width: int = 0
    height: int = 0
    """Pixels."""
    frames: int = 0
    seconds: float = 0.0
    samples: int = 0
    sample_rate: int = 0
    """Hz; for a clip, that of its sound track."""
    channels: int = 0
    by_av: bool = False
    """Read through PyAV, not through Pillow or soundfile."""

    @property
    def decoded_bytes(self) -> int:
        """Of the array, and of the sound track of a clip."""
        pictures = 3 * self.width * self.height * max(self.frames, 1)
        return pictures + 4 * self.samples * self.channels
