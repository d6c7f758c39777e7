"""Atomic writes: files and folders are written completely or not at all, even if the process is
killed or the power fails.

Content is written to a draft in the same folder, `.NAME.NAMESPACE-PID.partial`, synced to the disk
and renamed. The draft's name identifies the process that writes it, so that later processes
recognise and delete the drafts of dead ones.
"""

from __future__ import annotations

import errno
import functools
import glob
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmllm.errors import MmllmError, brief_reason
from mmllm.utils.hashing import sha256

PARTIAL = ".partial"
"""Suffix of a draft."""
_REPLACED = ".replaced"
_ABANDONED = 24 * 3600.0
"""Seconds without a change after which a draft of an unknown process counts as abandoned."""
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS, errno.EACCES, errno.EBADF}
"""Errors of file systems that cannot sync a folder, or need no sync."""


@contextmanager
def write_errors(path: Path, kind: type[MmllmError], remedy: str) -> Iterator[None]:
    """Convert failures to write inside the block (disk full, quota, read-only file system) into an
    error with the path, the system's reason and a remedy.

    Args:
        path: the file or folder that is written.
        kind: the class of the error.
        remedy: what the user can do, as the end of the message.
    """
    from safetensors import SafetensorError

    try:
        yield
    except MmllmError:
        raise
    # SafetensorError is no OSError; tokenizers raises a plain Exception.
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        why = getattr(error, "strerror", None) or brief_reason(error)
        raise kind(f"{path}: cannot be written: {why}; {remedy}") from error


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a draft folder that replaces `folder` when the block succeeds.

    If the block raises, the draft is deleted and `folder` is unchanged. At any moment either the
    old or the new folder is complete on the disk: see `current_folder`. Raises OSError.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_drafts(folder.parent, f".{glob.escape(folder.name)}.*{PARTIAL}")
    draft = draft_path(folder)
    remove(draft)
    try:
        draft.mkdir()
        yield draft
        share_files(draft)
        _sync_tree(draft)
        _replace_folder(draft, folder)
    except BaseException:
        with suppress(OSError):
            remove(draft)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a draft file that replaces `path` when the block succeeds; it is deleted if the block
    raises. Raises OSError."""
    draft = draft_path(path)
    try:
        yield draft
        publish(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file that holds either its old or its new content at any moment.

    Args:
        path: the file.
        content: its new content; a str is encoded as UTF-8.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def publish(draft: Path, path: Path) -> None:
    """Sync a finished draft to the disk and rename it.

    Args:
        draft: the file or folder.
        path: its new name, on the same file system.

    Raises:
        OSError: it cannot be synced or renamed.
    """
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def share_files(folder: Path) -> None:
    """Let everybody read the files of a folder who may read the folder: libraries, safetensors
    among them, write some for their owner alone. Raises OSError."""
    readers = folder.stat().st_mode & 0o444
    for path in folder.rglob("*"):
        if path.is_file() and (mode := path.stat().st_mode) & readers != readers:
            path.chmod(mode | readers)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def current_folder(folder: Path) -> Path:
    """Return the complete folder of this name: `folder`, or its previous content if the process was
    killed between the two renames of `atomic_folder`."""
    aside = _aside(folder)
    return aside if not folder.exists() and aside.is_dir() else folder


def draft_path(path: Path) -> Path:
    """Return the path of this process's draft of `path`, in the same folder."""
    path = path if path.name else path.absolute()  # "." has no name
    return path.with_name(f".{path.name}.{process_namespace()}-{os.getpid()}{PARTIAL}")


def remove_stale_drafts(folder: Path, pattern: str = f"*{PARTIAL}", *, sole: bool = False) -> None:
    """Delete the drafts in `folder` that no living process writes.

    Args:
        folder: the folder that holds the drafts.
        pattern: glob pattern of the drafts.
        sole: whether only the caller writes to this folder, so that every draft is stale.
    """
    for draft in folder.glob(pattern):
        if sole or _is_abandoned(draft):
            with suppress(OSError):  # another process may be deleting it too
                remove(draft)


def recover_folder(folder: Path) -> None:
    """Delete the drafts of killed processes and restore the folders that they were replacing, in a
    folder to which only the caller writes."""
    remove_stale_drafts(folder, sole=True)
    for aside in folder.glob(f".*{_REPLACED}"):
        place = folder / aside.name.removeprefix(".").removesuffix(_REPLACED)
        with suppress(OSError):
            if place.exists():
                remove(aside)
            else:
                aside.rename(place)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_files(source: Path, target: Path) -> None:
    """Move all files of one folder into another, replacing those of the same name.

    Args:
        source: the folder, deleted afterwards.
        target: a folder on the same file system.

    Raises:
        OSError: a file cannot be moved.
    """
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    remove(source)
    sync(target)


def free_bytes(path: Path) -> int:
    """Return the free space, in bytes, of the file system on which `path` is or will be."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


@functools.cache
def process_namespace() -> str:
    """Return eight hexadecimal digits that identify the scope in which a PID is unique: this host
    since its last boot, and this container's PID namespace."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return sha256("\n".join(facts))[:8]


def process_start_time(pid: int) -> str | None:
    """Return when a process of this namespace started, in clock ticks since boot.

    Unlike psutil's creation time, this does not change when the clock is set.

    Args:
        pid: the process id.

    Returns:
        The start time; None if there is no such process or only its exit code is left; "" if the
        system does not report it.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:  # the process exists and belongs to another user
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _replace_folder(draft: Path, folder: Path) -> None:
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
    """Return the path of a folder's previous content while the folder is being replaced."""
    folder = folder if folder.name else folder.absolute()
    return folder.with_name(f".{folder.name}{_REPLACED}")


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def _is_abandoned(draft: Path) -> bool:
    owner = draft.name.removesuffix(PARTIAL).rpartition(".")[2]
    namespace, _, pid = owner.partition("-")
    if namespace == process_namespace() and pid.isdigit():
        return process_start_time(int(pid)) is None
    try:
        changed = max(path.stat().st_mtime for path in (draft, *draft.rglob("*")))
    except OSError:  # the draft is being written or deleted
        return False
    return time.time() - changed > _ABANDONED
