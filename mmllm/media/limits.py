"""How large a medium may be, and how much its decoding may cost.

The size is compared with the header before a single pixel is decoded; the cost is counted while
decoding, between frames, packets and blocks, since headers can be wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from mmllm.errors import OversizedMediaError


@dataclass(frozen=True)
class Limits:
    """The largest medium that is decoded, and the most that decoding one may cost."""

    bytes: int = 256 * 2**20
    """Of the file."""
    pixels: int = 50_000_000
    """Width x height of a picture or of one frame."""
    ratio: float = 100.0
    """Of the longer to the shorter side of a picture or a frame: encoders that scale the shorter
    side to a fixed length make an array that grows with it."""
    seconds: float = 600.0
    """Of a sound or a clip."""
    frames: int = 20_000
    """Of a clip."""
    decoded_bytes: int = 2**29
    """Of the decoded array. A long clip is read within it by `sample_frames`."""
    decoded_pixels: int = 100_000_000_000
    """Width x height of every frame that is decoded on the way to those that are kept, in all."""
    decoding_seconds: float = 120.0
    """Of wall clock that decoding one medium may take."""


_current: ContextVar[Limits] = ContextVar("mmllm_media_limits")
_DEFAULT = Limits()


def current_limits() -> Limits:
    """The limits in force here."""
    return _current.get(_DEFAULT)


@contextmanager
def limits(base: Limits | None = None, **changes: Any) -> Iterator[Limits]:
    """`with media.limits(seconds=30): ...`: other limits for this thread or task.

    `base` (default: those in force) with `changes` to its fields.
    """
    token = _current.set(replace(base or current_limits(), **changes))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


def check_limit(name: str, limit: str, value: float, unit: str) -> None:
    """Raises OversizedMediaError where a value is beyond the limit of that name."""
    allowed = getattr(current_limits(), limit)
    if value > allowed:
        raise OversizedMediaError(
            f"{name}: {value:.10g} {unit}, more than the limit of {allowed:.10g}; make it smaller "
            f"or use `with mmllm.media.limits({limit}=...):`"
        )


def check_size(name: str, width: int, height: int) -> None:
    """Raises OversizedMediaError where a picture or a frame has too many pixels or is too thin."""
    size = f"({width} x {height})"
    check_limit(name, "pixels", width * height, f"pixels {size}")
    ratio = max(width, height) / max(1, min(width, height))
    check_limit(name, "ratio", ratio, f"times as long as wide {size}")


class DecodingCost:
    """The time and the pixels that the decoding of one medium has taken so far."""

    def __init__(self, name: str) -> None:
        """The clock starts. `name` is what messages call the medium."""
        self.name = name
        self._start = time.monotonic()
        self._pixels = 0

    def check(self) -> None:
        """Raises OversizedMediaError once decoding has taken too long."""
        seconds = time.monotonic() - self._start
        check_limit(self.name, "decoding_seconds", seconds, "seconds of decoding")

    def add_frame(self, width: int, height: int) -> None:
        """Counts a decoded frame; raises OversizedMediaError when it is one too many."""
        check_size(self.name, width, height)
        self._pixels += width * height
        check_limit(self.name, "decoded_pixels", self._pixels, "pixels decoded")
        self.check()
