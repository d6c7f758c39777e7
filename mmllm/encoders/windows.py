"""Audio and video of any length -> tokens of windows of a few seconds, each with its time, by an
encoder of audio or video."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmllm.conversation import Audio, Medium, Video
from mmllm.encoders.base import ModalityEncoder
from mmllm.encoders.pieces import PiecesEncoder, build_inner
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class WindowsConfig:
    """Which encoder, on windows of which length, within which budget."""

    modality: Literal["audio", "video"] = "audio"
    """What is cut into windows."""
    encoder: Mapping[str, Any] = field(default_factory=lambda: {"type": "aisfx"})
    """An encoder of that modality as a system's `encoders` has it: its `type` and its keys."""
    seconds: float = 30.0
    """The length of a window: not more than the encoder reads."""
    max_tokens: int = 1024
    """Tokens of a medium at most: of a medium with more windows, so many that are evenly spaced."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise ConfigError(f"seconds: expected more than 0, at most 3600, got {self.seconds}")


class WindowsEncoder(PiecesEncoder):
    """One window behind the other, the last maybe shorter. Sixteen channels behind the encoder's
    tell the second at which a window begins."""

    def __init__(self, config: WindowsConfig, inner: ModalityEncoder):
        self.modality = config.modality  # pyright: ignore[reportAttributeAccessIssue]
        self._seconds = config.seconds
        super().__init__("windows", inner, config.max_tokens, facts=[config.seconds], has_time=True)

    def cut(self, medium: Audio | Video, most: int) -> list[tuple[Medium, float]]:
        if isinstance(medium, Video):
            medium = medium.decoded()
        array = medium.to_numpy()
        rate = medium.fps if isinstance(medium, Video) else medium.decoded().sample_rate
        length = len(array) if isinstance(medium, Video) else array.shape[1]
        assert rate
        step = max(round(self._seconds * rate), 1)
        num = max(math.ceil(length / step), 1)
        starts = [index * step for index in range(num)]
        if num > most:
            spread = (length - step) / max(most - 1, 1)
            starts = [round(index * spread) for index in range(most)]
        return [(_slice(medium, at, step), at / rate) for at in starts]


def _slice(medium: Audio | Video, start: int, length: int) -> Medium:
    """So many samples or frames of a medium, with that part of a clip's track."""
    array = medium.to_numpy()
    if isinstance(medium, Audio):
        rate = medium.decoded().sample_rate
        return Audio(array=array[:, start : start + length], sample_rate=rate)
    assert medium.fps
    track = medium.audio
    if track is not None:
        rate = (track := track.decoded()).sample_rate
        assert rate
        first, last = (round(at / medium.fps * rate) for at in (start, start + length))
        samples = track.to_numpy()[:, first:last]
        track = replace(track, source=None, array=samples) if samples.shape[1] else None
    return Video(array=array[start : start + length], fps=medium.fps, audio=track)


def build(config: WindowsConfig) -> ModalityEncoder:
    """The frozen encoder with the encoder of windows inside. Raises ConfigError and AssetError."""
    inner = build_inner(config.encoder, "windows.encoder", config.modality)
    return WindowsEncoder(config, inner)
