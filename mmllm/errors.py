"""The exceptions of mmllm. Messages say what is wrong, where, what was expected, and a remedy."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Generator
from contextlib import contextmanager

_QUOTED = 120
"""Characters of an input value that a message quotes at most."""
_BITS = 1024
"""Integers of more bits are quoted by their number of digits."""
_REASON = 300
"""Characters of a library's message that a message of mmllm quotes at most."""


def quoted(value: object) -> str:
    """Return `repr(value)`, shortened to fit into a message. The parts left out of long texts, long
    lists and deep nesting are never formatted, so large values cost no time."""
    short = _Repr()
    short.maxlevel = 3
    short.maxstring = short.maxother = _QUOTED
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 4
    text = short.repr(value)
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 1]}…"


class _Repr(reprlib.Repr):
    """A `reprlib.Repr` that also shortens integers of thousands of digits, which Python refuses to
    convert to text."""

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() <= _BITS:
            return super().repr_int(x, level)
        return f"an integer of about {int(x.bit_length() * math.log10(2))} digits"


class MmllmError(Exception):
    """Base of all errors that mmllm raises on purpose; the CLI shows it without a stack trace."""


class ConfigError(MmllmError, ValueError):
    """A configuration that is invalid: an unknown key, a wrong type, or values that contradict."""


class MediaError(MmllmError, ValueError):
    """A medium that is missing, damaged, empty, too large or of another modality."""


class MissingMediaError(MediaError):
    """A medium whose file does not exist."""


class OversizedMediaError(MediaError):
    """A medium that exceeds the limits (mmllm.media.limits); it was not decoded."""


class OutsideRootError(MediaError):
    """A file that lies outside its dataset's root, or is not local; it was not opened."""


class RowError(MediaError):
    """A row of a dataset that is no valid conversation; training skips and counts such rows, as it
    does for media that cannot be read."""


class EmptyCaptionError(RowError):
    """A row or a medium whose caption is empty where one is needed."""


class PlaceholderError(RowError):
    """A row whose placeholders do not match its media."""


class LongRowError(RowError):
    """A row of more tokens than `stage.max_length`."""


class AssetError(MmllmError, OSError):
    """Weights or data files that cannot be found or downloaded."""


class CacheError(MmllmError, ValueError):
    """A feature cache that is incomplete, damaged, or was computed by other components."""


class CheckpointError(MmllmError, ValueError):
    """A checkpoint that is missing, damaged, or of another model."""


class ContextError(MmllmError, ValueError):
    """A message that does not fit into the language model's context."""


class TrainingError(MmllmError, RuntimeError):
    """Training cannot go on: too many bad items, losses that are not finite, no progress."""


@contextmanager
def wrap_errors(kind: type[MmllmError], what: object) -> Generator[None]:
    """Convert any exception of a library inside the block into an error of class `kind`.

    Panics of libraries in Rust, which are BaseExceptions, are converted too; mmllm's own errors
    pass unchanged.

    Args:
        kind: the class of the new error.
        what: what failed; the message is `what: reason`.
    """
    try:
        yield
    except MmllmError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {brief_reason(error)}") from error


def brief_reason(error: BaseException) -> str:
    """Return a short description of an exception: the first line of its message, shortened, after
    its class where the message alone would be unclear."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next(iter(text.strip().splitlines()), "")
    line = line if len(line) <= _REASON else f"{line[: _REASON - 1]}…"
    telling = isinstance(error, OSError | ValueError | RuntimeError) and line
    return line if telling else f"{type(error).__name__}: {line}".removesuffix(": ")
