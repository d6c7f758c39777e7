"""Files in and out: opening what a medium points to, and writing all or nothing."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from mmllm.conversation import Embedded
from mmllm.errors import MediaError, MissingMediaError, OversizedMediaError
from mmllm.media.limits import DecodingCost, current_limits

MediaSource: TypeAlias = str | Path | bytes | Embedded
"""A path, the bytes of a file, or a file inside another."""


_LONGEST_NAME = 300
_LONGEST_REASON = 200


def name_of(source: MediaSource) -> str:
    """How messages call a source."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    name = str(source)
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"


def brief(error: object) -> str:
    """The first line of what a library says, cut to a length that fits into a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:_LONGEST_REASON]


@contextmanager
def opened(source: MediaSource) -> Iterator[BinaryIO]:
    """The file behind a source, once its presence and length are checked.

    Raises:
        MediaError: missing, not a file, unreadable, empty, or more bytes than the limits allow.
    """
    name, allowed = name_of(source), current_limits().bytes
    if isinstance(source, Embedded):
        source = source.read()
    try:
        path = None if isinstance(source, bytes) else Path(source).expanduser()
        if path is not None and path.is_dir():
            raise MediaError(f"{name}: expected a file, got a folder")
        size = path.stat().st_size if path is not None else len(source)  # type: ignore[arg-type]
        if size == 0:
            raise MediaError(f"{name}: the file is empty (0 bytes); was it copied completely?")
        if size > allowed:
            raise OversizedMediaError(
                f"{name}: {size} bytes, more than the limit of {allowed}; make it smaller or use "
                f"`with mmllm.media.limits(bytes={size}):`"
            )
        file = path.open("rb") if path is not None else io.BytesIO(source)  # type: ignore[arg-type]
    except FileNotFoundError as error:
        remedy = " (download it first: only local files are read)" if "://" in name else ""
        raise MissingMediaError(f"{name}: no such file{remedy}") from error
    # A home that nobody has is a RuntimeError, a name with a null character a ValueError.
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        why = getattr(error, "strerror", None) or brief(error)
        raise MediaError(f"{name}: cannot be read ({why})") from error
    with file:
        yield file


def timed(file: BinaryIO, cost: DecodingCost) -> BinaryIO:
    """The file, whose `read` raises OversizedMediaError once decoding has taken too long: it ends
    a library's loops over frames, chunks and packets, too."""
    return cast(BinaryIO, _Timed(file, cost))


class _Timed:
    """No more of a file than libraries need, so that none reads past it by its descriptor."""

    def __init__(self, file: BinaryIO, cost: DecodingCost) -> None:
        self._read, self._cost = file.read, cost
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self._cost.check()
        return self._read(size)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` (same suffix) that takes its place when all went well.

    Raises:
        MediaError: the folder cannot be written, the disk is full; the old file is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(path.suffix, f".{path.stem}-", path.parent)
        os.close(handle)
        temporary = Path(made)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise MediaError(
            f"{path}: cannot be written ({error.strerror or error}); is the disk full or the "
            "folder read-only?"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's mask: `mkstemp` would leave files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
