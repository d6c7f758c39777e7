"""Files and folders that are written whole or not at all, also through a kill or a power loss.

What is being written is a draft beside its place, `.NAME.TABLE-PID.partial`: it becomes durable
(fsync) and is renamed. A draft tells which process writes it, so that whoever comes later knows
what a dead one has left and deletes it.
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmllm.errors import MmllmError, brief_reason

PARTIAL = ".partial"
_REPLACED = ".replaced"
_ABANDONED = 24 * 3600.0
"""Seconds without a change after which a draft is given up whose process cannot be looked for."""
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS, errno.EACCES, errno.EBADF}
"""What file systems answer that cannot sync a folder, or need not."""


@contextmanager
def write_errors(path: Path, kind: type[MmllmError], remedy: str) -> Iterator[None]:
    """Raises one `kind` with the path, the system's reason and a remedy for whatever goes wrong
    when something is written: no space, a quota, a limit, a file system that is read-only."""
    from safetensors import SafetensorError

    try:
        yield
    except MmllmError:
        raise
    except Exception as error:  # that of safetensors is no OSError, that of tokenizers a bare one
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        why = getattr(error, "strerror", None) or brief_reason(error)
        raise kind(f"{path}: cannot be written: {why}; {remedy}") from error


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A draft to be filled, which takes the place of `folder` when the block ends well; otherwise
    it is deleted, and what was there before stays. At any moment the old or the new folder is
    whole on the disk: see `current_folder`. Raises OSError."""
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_drafts(folder.parent, f".{glob.escape(folder.name)}.*{PARTIAL}")
    draft = draft_path(folder)
    remove(draft)
    try:
        draft.mkdir()
        yield draft
        _sync_tree(draft)
        _put_in_place(draft, folder)
    except BaseException:
        with suppress(OSError):
            remove(draft)
        raise


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file that is the old or the new one at any moment. Raises OSError."""
    draft = draft_path(path)
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def publish(draft: Path, path: Path) -> None:
    """Give a finished draft its name, when the disk holds what it says. Raises OSError."""
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def current_folder(folder: Path) -> Path:
    """The folder under this name; where a kill came between the two renames that replace it, the
    one that it was."""
    aside = _aside(folder)
    return aside if not folder.exists() and aside.is_dir() else folder


def draft_path(path: Path) -> Path:
    """A name beside `path`, on the same file system, that tells who writes there."""
    path = path if path.name else path.absolute()  # "." has no name
    return path.with_name(f".{path.name}.{process_namespace()}-{os.getpid()}{PARTIAL}")


def remove_stale_drafts(folder: Path, pattern: str = f"*{PARTIAL}", *, sole: bool = False) -> None:
    """Delete the drafts in `folder` that no living process writes. `sole`: nobody but the caller
    writes there, so that none of them has a writer."""
    for draft in folder.glob(pattern):
        if sole or _is_abandoned(draft):
            with suppress(OSError):  # another process may sweep too
                remove(draft)


def recover_folder(folder: Path) -> None:
    """Finish what killed processes began in a folder where nobody but the caller writes: delete
    their drafts, and put back a folder that was being replaced."""
    remove_stale_drafts(folder, sole=True)
    for aside in folder.glob(f".*{_REPLACED}"):
        place = folder / aside.name.removeprefix(".").removesuffix(_REPLACED)
        with suppress(OSError):
            if place.exists():
                remove(aside)
            else:
                aside.rename(place)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder into another one of the same file system, over those of the same
    names, and delete the folder. Raises OSError."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    remove(source)
    sync(target)


@functools.cache
def process_namespace() -> str:
    """Eight hex digits for the table in which a PID means something: this start of this machine,
    and in it this container."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def process_start_time(pid: int) -> str | None:
    """When a process of this table began, in ticks since the machine did; None if there is no such
    process, or nothing left of it but its exit code; "" where the system does not tell.

    Not psutil's time of creation, which moves when the clock is set.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:  # somebody else's, so it is there
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _put_in_place(draft: Path, folder: Path) -> None:
    aside = _aside(folder)
    if not folder.exists():
        draft.rename(folder)
    else:
        remove(aside)
        folder.rename(aside)
        try:
            draft.rename(folder)
        except BaseException:
            aside.rename(folder)
            raise
    sync(folder.parent)
    with suppress(OSError):
        remove(aside)


def _aside(folder: Path) -> Path:
    folder = folder if folder.name else folder.absolute()
    return folder.with_name(f".{folder.name}{_REPLACED}")


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def _is_abandoned(draft: Path) -> bool:
    owner = draft.name.removesuffix(PARTIAL).rpartition(".")[2]
    table, _, pid = owner.partition("-")
    if table == process_namespace() and pid.isdigit():
        return process_start_time(int(pid)) is None
    try:
        changed = max(path.stat().st_mtime for path in (draft, *draft.rglob("*")))
    except OSError:  # it is being written, or swept
        return False
    return time.time() - changed > _ABANDONED
