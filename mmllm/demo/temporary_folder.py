"""The folder of a running demo, in the system's temporary directory.

It holds what people sent and what was made for them, so it must not outlive its process. What a
process that was killed left behind is deleted when the next demo starts: a folder is in use while
its process holds a lock on it, which the system gives up with the process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows: folders are deleted at the end only
    fcntl = None

_PREFIX = "mmllm-demo-"


class TemporaryFolder:
    """A new folder, locked until `delete`."""

    def __init__(self) -> None:
        delete_stale_folders()
        self._lock = None
        while self._lock is None:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
            self._lock = _lock(self.path)  # none if another demo, which starts now, was faster

    def delete(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None and self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def delete_stale_folders() -> None:
    """Delete the folders of this user's demos that are not running any more."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if fcntl is None or path.is_symlink() or not path.is_dir() or not _is_mine(path):
            continue
        lock = _lock(path)
        if lock is not None and lock >= 0:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(path: Path) -> int | None:
    """The descriptor that holds the lock of a folder; None if another process holds it or the
    folder is gone; -1 where folders cannot be locked."""
    if fcntl is None:
        return -1
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(folder), path.stat()):
            return folder
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(folder)
        return -1
    os.close(folder)
    return None


def _is_mine(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_uid == os.getuid()
    return False
