"""Limits on the size of media and on the cost of decoding them.

Sizes are checked from the header before any pixel is decoded. Since headers can be wrong, the cost
is also counted while decoding, between frames, packets and blocks.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from mmllm.errors import OversizedMediaError


@dataclass(frozen=True)
class Limits:
    """The maximum size of a medium that is decoded, and the maximum cost of decoding it."""

    bytes: int = 256 * 2**20
    """Size of the file."""
    pixels: int = 50_000_000
    """Width x height of an image or of one video frame."""
    ratio: float = 100.0
    """Ratio of the longer to the shorter side of an image or frame: encoders that scale the shorter
    side to a fixed length create arrays that grow with it."""
    seconds: float = 600.0
    """Duration of audio or a video."""
    frames: int = 20_000
    """Number of frames of a video."""
    decoded_bytes: int = 2**29
    """Size of the decoded array. `sample_frames` reads a long video within it."""
    decoded_pixels: int = 100_000_000_000
    """Total width x height of all frames that are decoded, whether they are kept or not."""
    decoding_seconds: float = 120.0
    """Wall-clock time of decoding one medium."""


_current: ContextVar[Limits] = ContextVar("mmllm_media_limits")
_DEFAULT = Limits()


def current_limits() -> Limits:
    """Return the limits of the current thread or task."""
    return _current.get(_DEFAULT)


@contextmanager
def limits(base: Limits | None = None, **changes: Any) -> Generator[Limits]:
    """Set other limits for this thread or task inside the block.

    Args:
        base: the limits to start from; by default the current ones.
        **changes: new values of fields of Limits.

    Example:
        >>> with limits(seconds=30) as allowed:
        ...     print(allowed.seconds)
        30
    """
    token = _current.set(replace(base or current_limits(), **changes))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


def check_limit(name: str, limit: str, value: float, unit: str) -> None:
    """Raise OversizedMediaError if a value exceeds a limit.

    Args:
        name: the medium's name in messages.
        limit: a field of Limits.
        value: the value of the medium.
        unit: the unit of the value, for the message.
    """
    allowed = getattr(current_limits(), limit)
    if value > allowed:
        raise OversizedMediaError(
            f"{name}: {value:.10g} {unit}, more than the limit of {allowed:.10g}; make it smaller "
            f"or use `with mmllm.media.limits({limit}=...):`"
        )


def check_size(name: str, width: int, height: int) -> None:
    """Raise OversizedMediaError if an image or frame has too many pixels or too long a side.

    Args:
        name: the medium's name in messages.
        width: columns of pixels.
        height: rows of pixels.
    """
    size = f"({width} x {height})"
    check_limit(name, "pixels", width * height, f"pixels {size}")
    ratio = max(width, height) / max(1, min(width, height))
    check_limit(name, "ratio", ratio, f"times as long as wide {size}")


class DecodingCost:
    """The time and the number of pixels that decoding one medium has taken so far.

    Args:
        name: the medium's name in messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._start = time.monotonic()
        self._pixels = 0

    def check(self) -> None:
        """Raise OversizedMediaError if decoding has taken too long."""
        seconds = time.monotonic() - self._start
        check_limit(self.name, "decoding_seconds", seconds, "seconds of decoding")

    def add_frame(self, width: int, height: int) -> None:
        """Count a decoded frame.

        Args:
            width: columns of pixels.
            height: rows of pixels.

        Raises:
            OversizedMediaError: the frame, all frames so far, or the time that they took exceed a
                limit.
        """
        check_size(self.name, width, height)
        self._pixels += width * height
        check_limit(self.name, "decoded_pixels", self._pixels, "pixels decoded")
        self.check()
