"""A lock for one training process per run folder: `OUTPUT/train.lock` names it.

The file names the process, and its time is the holder's last sign of life, which comes every few
seconds. A process of the same table is looked up, so that what a killed one left is known at once.
A process elsewhere (a job requeued on another machine, another container) counts as alive while its
signs come; the file system measures their age, not the clocks of two machines. No flock: on network
file systems it is often missing, or only local.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from mmllm import config as configs
from mmllm.errors import ConfigError, TrainingError
from mmllm.utils import files

logger = logging.getLogger(__name__)

NAME = "train.lock"
BEAT = 5.0
"""Seconds between two heartbeats."""
SILENCE = 60.0
"""Seconds without a heartbeat after which a process that cannot be looked up counts as dead."""
_LEAST = 2**20
"""Least free bytes for a run folder: about as many as config, metrics, curves and report take."""


@dataclass(frozen=True)
class Holder:
    """The process that a lock names: `table` and `start` as mmllm.utils.files reports them."""

    host: str
    pid: int
    since: str
    table: str
    start: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"

    def is_alive(self) -> bool | None:
        """None if that cannot be looked up from here."""
        if self.table != files.process_namespace():
            return None
        start = files.process_start_time(self.pid)
        if start is None:
            return False
        return start == self.start if start and self.start else None


class RunLock:
    """A context manager for the one process that trains into `folder`. Entering raises ConfigError
    if another process does, or if the folder cannot be written; what killed processes left half
    done is then cleared away."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / NAME
        self.own = Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            table=files.process_namespace(),
            start=files.process_start_time(os.getpid()) or "",
            token=uuid.uuid4().hex,
        )
        self._done = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True, name="run lock")

    def __enter__(self) -> RunLock:
        remedy = "free some space, or name another folder with stage.output=…"
        with files.write_errors(self.folder, ConfigError, remedy):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                self._try_out()
            except BaseException:
                self._release()
                raise
        self._beats.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._beats.join()
        self._release()

    def check(self) -> None:
        """Raise TrainingError if another process has taken the folder, having seen no sign of
        life from this one: its machine was suspended, or cut off from the disk."""
        holder = self._holder(self._content())
        if holder and holder.token != self.own.token:
            raise TrainingError(
                f"{self.folder}: {holder} has gone on with this run, because this process gave no "
                f"sign of life for {SILENCE:.0f} seconds; it ends here and leaves the folder alone"
            )

    def _acquire(self) -> None:
        seen = None
        while not self._create():
            content = self._content()
            if content is None:  # it was released meanwhile
                continue
            holder, (age, beat) = self._holder(content), self._last_beat()
            alive = holder.is_alive() if holder else None
            if alive or (seen is not None and beat != seen):
                raise ConfigError(
                    f"{self.folder}: {holder or 'another process'} trains into this folder; wait "
                    "for it, stop it, or name another folder with stage.output=…"
                )
            if alive is False or age > SILENCE:
                remove_stale(self.path, content)
            elif seen is None:
                seen = beat
                logger.warning(
                    "%s: %s may train into this folder; waiting up to %.0f s for a sign of life",
                    self.folder,
                    holder or "another process",
                    SILENCE,
                )
            else:
                time.sleep(BEAT / 5)

    def _create(self) -> bool:
        """Whether the lock was free."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                json.dump(asdict(self.own), stream)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _content(self) -> bytes | None:
        """Return the lock's contents; None if there is no lock."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _holder(self, content: bytes | None) -> Holder | None:
        """Parse the owner; None for a lock that is being written or damaged."""
        try:
            return configs.parse(Holder, json.loads(content or b""), str(self.path))
        except (ValueError, RecursionError):
            return None

    def _last_beat(self) -> tuple[float, int]:
        """(seconds ago, time in ns) of the last sign of life, both by the file system's clock."""
        own = files.draft_path(self.path)
        own.write_bytes(b"now")
        now = own.stat().st_mtime_ns
        own.unlink()
        try:
            with self.path.open(
                "rb"
            ) as lock:  # opened: network file systems keep times for a while
                beat = os.fstat(lock.fileno()).st_mtime_ns
        except FileNotFoundError:
            beat = now
        return (now - beat) / 1e9, beat

    def _try_out(self) -> None:
        """Delete leftovers of killed processes and check that the disk accepts what a run writes
        at least. Raises OSError."""
        for folder in (self.folder, self.folder / "checkpoints"):
            files.recover_folder(folder)
        trial = self.folder / f"{NAME}.trial"
        files.atomic_write(trial, bytes(_LEAST))
        trial.unlink()

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with contextlib.suppress(OSError):
                holder = self._holder(self._content())
                if holder is None:
                    self._create()  # somebody has deleted the file, or the folder
                elif holder.token == self.own.token:
                    os.utime(self.path)

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            holder = self._holder(self._content())
            if holder and holder.token == self.own.token:
                self.path.unlink()


def remove_stale(path: Path, content: bytes) -> None:
    """Delete the lock of a dead process, unless another process has replaced it meanwhile.

    Args:
        path: the lock file.
        content: what the file contained when it was found stale; a file with other contents is
            the lock of another process and stays.
    """
    aside = files.draft_path(path)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if aside.read_bytes() != content:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()
