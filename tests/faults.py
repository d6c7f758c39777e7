"""Disks that take nothing more, and files that are not what was written: faults to be tried out.

The rules hold for root too, whom the permissions of a folder do not stop: they are looked at where
Python asks the system (`sys.addaudithook`), and a limit on a file's size is the system's own.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.utime", "os.chmod"}
_refused: dict[str, int] = {}
_installed = False


@contextmanager
def refused_writes(folder: Path, code: int = errno.EROFS) -> Iterator[None]:
    """Every write to `folder` (a folder with all below it, or a file, or drafts of them) fails with
    this error of the system."""
    global _installed
    if not _installed:
        sys.addaudithook(_look)  # for good: Python does not take one back
        _installed = True
    _refused[os.path.realpath(folder)] = code
    try:
        yield
    finally:
        del _refused[os.path.realpath(folder)]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def zero(path: Path) -> None:
    """Fill a file with zeros, as a power loss leaves one that was not synced."""
    path.write_bytes(bytes(path.stat().st_size))


def zero_end(path: Path) -> None:
    """Fill the second half of a file with zeros."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def flip(path: Path, place: int = -1) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "zeroed": zero,
    "half zeroed": zero_end,
    "a flipped bit": flip,
    "cut": cut,
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b"") and None,
}


def drafts(folder: Path) -> list[str]:
    """Unfinished drafts anywhere below a folder."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in (".partial", ".replaced", ".trial", ".lock")
    )


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    if not _refused or (event != "open" and event not in _CHANGES):
        return
    if event == "open":
        path, mode, flags = arguments
        if not (set(mode or "") & set("wax+") or (flags or 0) & _WRITES):
            return
    for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
        if isinstance(path, str | bytes | os.PathLike):
            place = os.path.realpath(os.fsdecode(path))
            for folder, code in _refused.items():
                draft = os.path.join(os.path.dirname(folder), f".{os.path.basename(folder)}.")
                if place == folder or place.startswith((folder + os.sep, draft)):
                    raise OSError(code, os.strerror(code), place)
