"""Sources of media: open the file of a medium, and write a file atomically."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from mmllm.errors import MediaError, MissingMediaError, OversizedMediaError
from mmllm.media.limits import DecodingCost, current_limits

_LONGEST_NAME = 300
_LONGEST_REASON = 200


@dataclass(frozen=True)
class Embedded:
    """A file inside another one, such as a tar or a Parquet file.

    Attributes:
        name: its location, for messages.
        read: returns its bytes; called each time they are needed.
    """

    name: str
    read: Callable[[], bytes] = field(compare=False)

    def __str__(self) -> str:
        return self.name


MediaSource: TypeAlias = str | Path | bytes | Embedded
"""The source of a medium: a path, the bytes of a file, or a file inside another."""


def name_of(source: MediaSource) -> str:
    """Return the name of a source for messages, shortened if necessary."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    name = str(source)
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"


def brief(error: object) -> str:
    """Return the first line of a library's error, shortened to fit into a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:_LONGEST_REASON]


@contextmanager
def opened(source: MediaSource) -> Iterator[BinaryIO]:
    """Open the file of a source, after checking that it exists and its size.

    Raises:
        MediaError: the file is missing, no regular file, unreadable, empty, or larger than the
            limits allow.
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
    # An unknown home folder is a RuntimeError, a name with a null character a ValueError.
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        why = getattr(error, "strerror", None) or brief(error)
        raise MediaError(f"{name}: cannot be read ({why})") from error
    with file:
        yield file


def timed(file: BinaryIO, cost: DecodingCost) -> BinaryIO:
    """Wrap a file so that decoding it ends when it takes too long.

    Since libraries read in their loops over frames, chunks and packets, this ends those loops too.

    Args:
        file: the open file.
        cost: checked at every `read`, which then raises OversizedMediaError.
    """
    return cast(BinaryIO, _Timed(file, cost))


class _Timed:
    """A file without `fileno`, so that libraries cannot bypass `read`, which checks the cost."""

    def __init__(self, file: BinaryIO, cost: DecodingCost) -> None:
        self._read, self._cost = file.read, cost
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self._cost.check()
        return self._read(size)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder that replaces `path` when the block succeeds.

    Raises:
        MediaError: the folder cannot be written, or the disk is full; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # With the default permissions of a new file; `tempfile` sets stricter ones.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise MediaError(
            f"{path}: cannot be written ({error.strerror or error}); is the disk full or the "
            "folder read-only?"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
