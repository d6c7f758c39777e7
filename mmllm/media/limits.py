"""How large a medium may be: checked against its header, before a single pixel is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The largest medium that is decoded."""

    bytes: int = 256 * 2**20
    """Of the file."""
    pixels: int = 64_000_000
    """Width x height of a picture or of one frame."""
    seconds: float = 600.0
    """Of a sound or a clip."""
    frames: int = 20_000
    """Of a clip."""
    decoded_bytes: int = 2**30
    """Of the decoded array. A long clip is read within it by `sample_frames`."""


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
