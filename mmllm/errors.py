"""What users can be told: each class names a kind of trouble, each message what, where and how."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

_QUOTED = 120
"""Characters of a foreign value that a message quotes."""
_BITS = 1024
"""Of an integer that is quoted by its digits."""
_REASON = 300
"""Characters of a library's message that a message of ours quotes."""


def quoted(value: object) -> str:
    """`repr(value)`, cut to a length that fits into a message, whatever the value holds: long
    texts, long lists, deep nesting. What is cut is never built, so large values cost nothing."""
    short = _Repr()
    short.maxlevel = 3
    short.maxstring = short.maxother = _QUOTED
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 4
    text = short.repr(value)
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 1]}…"


class _Repr(reprlib.Repr):
    """`reprlib.Repr` that also shortens integers of thousands of digits, which Python refuses to
    write out."""

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() <= _BITS:
            return super().repr_int(x, level)
        return f"an integer of about {int(x.bit_length() * math.log10(2))} digits"


class MmllmError(Exception):
    """Base of all errors that mmllm raises on purpose; the CLI shows it without a stack trace."""


class ConfigError(MmllmError, ValueError):
    """A configuration that cannot be meant."""


class MediaError(MmllmError, ValueError):
    """A medium that is missing, damaged, empty, too large or of another kind."""


class MissingMediaError(MediaError):
    """A medium whose file is not there."""


class OversizedMediaError(MediaError):
    """A medium beyond the limits; it was not decoded."""


class OutsideRootError(MediaError):
    """A file that lies outside its dataset's root, or is not local; it was not opened."""


class RowError(MediaError):
    """A row of a dataset that is no conversation; training skips and counts it, as bad media."""


class EmptyCaptionError(RowError):
    """A row or a medium whose caption is empty where one is needed."""


class PlaceholderError(RowError):
    """Placeholders and media that do not match."""


class LongRowError(RowError):
    """A row of more tokens than `stage.max_length`."""


class AssetError(MmllmError, OSError):
    """A component's weights or a data file that cannot be had."""


class CacheError(MmllmError, ValueError):
    """A feature cache that lacks what is needed, is damaged, or was made by other parts."""


class CheckpointError(MmllmError, ValueError):
    """A checkpoint that is absent, damaged, or made for another model."""


class ContextError(MmllmError, ValueError):
    """A message that does not fit into the language model's context."""


class TrainingError(MmllmError, RuntimeError):
    """Training cannot go on: too many bad items, losses that are not finite, no progress."""


@contextmanager
def wrap_errors(kind: type[MmllmError], what: object) -> Iterator[None]:
    """Whatever a library raises within it becomes `kind`, with `what` before its message: a file
    that others wrote can be wrong in more ways than its reader has words for. A panic of a library
    in Rust, which is no Exception, is among it; mmllm's own errors pass."""
    try:
        yield
    except MmllmError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {brief_reason(error)}") from error


def brief_reason(error: BaseException) -> str:
    """What is said of an exception: the first line of its message, cut, and its class where the
    message alone would tell nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next(iter(text.strip().splitlines()), "")
    line = line if len(line) <= _REASON else f"{line[: _REASON - 1]}…"
    telling = isinstance(error, OSError | ValueError | RuntimeError) and line
    return line if telling else f"{type(error).__name__}: {line}".removesuffix(": ")
