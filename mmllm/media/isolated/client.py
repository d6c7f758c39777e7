"""The client of decoding workers: starts them, sends them files, kills those that take too long."""

from __future__ import annotations

import atexit
import contextlib
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from mmllm import errors
from mmllm.errors import MediaError, MmllmError, OversizedMediaError
from mmllm.media.files import Embedded, MediaSource, name_of, opened
from mmllm.media.info import MediaContent, MediaInfo
from mmllm.media.isolated import wire
from mmllm.media.limits import current_limits

SECONDS = 20.0
"""Default time limit for one file."""
PROCESSES = {"videos": 2, "others": 2}
"""Number of concurrent workers: slow videos never delay images and audio."""
_START_SECONDS = 60.0
_POLL_SECONDS = 0.05
_COMMAND = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from mmllm.media.isolated.worker import serve_parent; serve_parent()"
)


class DecodingCancelledError(MediaError):
    """Decoding of a medium was cancelled by its caller."""


def decode(
    source: MediaSource,
    modality: str,
    *,
    seconds: float = SECONDS,
    cancel: threading.Event | None = None,
) -> MediaContent:
    """Decode a file in a worker, as `mmllm.media.decode` does.

    Args:
        source: a path, the bytes of a file, or a file inside another.
        modality: the required modality: "image", "audio" or "video".
        seconds: time limit.
        cancel: an event that cancels the work when it is set from any thread.

    Returns:
        The decoded arrays.

    Raises:
        MediaError: as by `mmllm.media.decode`; also if decoding takes longer than `seconds` or too
            much memory, or crashes the worker.
        DecodingCancelledError: `cancel` was set.
    """
    pool = "videos" if modality == "video" else "others"
    header, arrays = _ask({"do": "decode", "modality": modality}, source, pool, seconds, cancel)
    audio = None
    if header["audio"] is not None:
        audio = MediaContent(arrays[1], **header["audio"])
    return MediaContent(arrays[0], audio=audio, **header["content"])


def sample_frames(
    source: MediaSource,
    num: int,
    *,
    seconds: float = SECONDS,
    cancel: threading.Event | None = None,
) -> np.ndarray:
    """Sample frames of a video file in a worker process, as `mmllm.media.sample_frames` does.

    Args:
        source: the file: a path, its bytes, or an `Embedded`.
        num: how many frames, one from the middle of each of `num` equal parts.
        seconds: the worker is ended after this many seconds.
        cancel: the worker is ended as soon as this event is set.

    Returns:
        uint8[num, H, W, 3].

    Raises:
        MediaError: as `decode`.
    """
    return _ask({"do": "sample_frames", "num": num}, source, "videos", seconds, cancel)[1][0]


def probe(
    source: MediaSource, *, seconds: float = SECONDS, cancel: threading.Event | None = None
) -> MediaInfo:
    """Read a file's header in a worker process, as `mmllm.media.probe` does.

    Args:
        source: the file: a path, its bytes, or an `Embedded`.
        seconds: the worker is ended after this many seconds.
        cancel: the worker is ended as soon as this event is set.

    Raises:
        MediaError: as `decode`.
    """
    header, _ = _ask({"do": "probe"}, source, "others", seconds, cancel)
    return MediaInfo(**header["info"])


def start() -> None:
    """Start one worker for videos and one for others, so that the first file does not wait."""
    for pool in _POOLS.values():
        pool.keep(pool.idle() or Worker())


def _ask(
    request: dict[str, Any],
    source: MediaSource,
    pool: str,
    seconds: float,
    cancel: threading.Event | None,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Send one request about one file to a worker; return its response and arrays."""
    limits, body = current_limits(), b""
    inside = isinstance(source, bytes | Embedded)
    if inside:
        with opened(source) as file:
            body = file.read()
    request = request | {
        "name": name_of(source),
        "inside": inside,
        "folder": "" if inside else os.getcwd(),
        "limits": asdict(limits),
        "seconds": seconds,
    }
    with _POOLS[pool].worker(cancel) as worker:
        header, data = worker.ask(request, body, seconds, cancel)
    if "error" in header:
        kind = getattr(errors, header["error"], MediaError)
        raise (kind if issubclass(kind, MediaError) else MediaError)(header["message"])
    return header, wire.split_arrays(header["arrays"], data)


class Worker:
    """A process that decodes one file at a time. Raises MmllmError if it does not start."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        STARTED.add(self)
        ready = self._within(_START_SECONDS, None, lambda: self._out.read(1))
        if ready != b"!":
            self.end()
            raise MmllmError("a process that decodes media did not start")

    @property
    def _out(self) -> BinaryIO:
        assert self.process.stdout is not None
        return self.process.stdout  # pyright: ignore[reportReturnType]

    @property
    def usable(self) -> bool:
        """Whether the process is still running."""
        return self.process.poll() is None

    def ask(
        self,
        request: dict[str, Any],
        body: bytes,
        seconds: float,
        cancel: threading.Event | None,
    ) -> tuple[dict[str, Any], bytearray]:
        """Send a request and return the response: a JSON object, and the bytes of arrays.

        Args:
            request: the operation, the name of the file and the limits.
            body: the bytes of the file; empty if the worker opens the file.
            seconds: time limit.
            cancel: cancels the request when it is set.

        Raises:
            MediaError: there is no response in time, or the process crashed; it is killed.
        """
        name = request["name"]
        max_bytes = 2 * request["limits"]["decoded_bytes"] + wire.OWN_MEMORY

        def exchange() -> tuple[dict[str, Any], bytearray]:
            assert self.process.stdin is not None
            wire.send(self.process.stdin, request, body)
            return wire.receive(self._out, max_bytes)

        try:
            response = self._within(seconds, cancel, exchange)
        except TimeoutError as error:
            raise OversizedMediaError(
                f"{name}: not decoded within {seconds:g} s; make it smaller, shorter or simpler"
            ) from error
        except InterruptedError as error:
            raise DecodingCancelledError(f"{name}: decoding was cancelled") from error
        if response is None:
            self.end()
            raise MediaError(
                f"{name}: the process that decoded it broke down; the file is damaged, or takes "
                "far more memory than its size lets expect"
            )
        return response

    def _within(
        self, seconds: float, cancel: threading.Event | None, work: Callable[[], Any]
    ) -> Any:
        """Return the result of `work`, or None if the process ended meanwhile. Kill the process and
        raise TimeoutError after `seconds`, InterruptedError if `cancel` is set."""
        results: list[Any] = []

        def run() -> None:
            with contextlib.suppress(OSError, ValueError, EOFError, struct.error):
                results.append(work())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        deadline = time.monotonic() + seconds
        while True:
            thread.join(_POLL_SECONDS)
            if not thread.is_alive():
                return results[0] if results else None
            cancelled = cancel is not None and cancel.is_set()
            if cancelled or time.monotonic() > deadline:
                self.end()
                thread.join()
                raise InterruptedError if cancelled else TimeoutError

    def end(self) -> None:
        """Kill the process."""
        STARTED.discard(self)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # unsent bytes are discarded
                if pipe is not None:
                    pipe.close()


class _Pool:
    """A pool of workers for one kind of file, started on demand."""

    def __init__(self, num: int):
        self._free = threading.Semaphore(num)
        self._idle: list[Worker] = []

    @contextmanager
    def worker(self, cancel: threading.Event | None) -> Iterator[Worker]:
        """Yield a worker for exclusive use. Raises DecodingCancelledError if `cancel` is set while
        all workers are busy."""
        while not self._free.acquire(timeout=_POLL_SECONDS):
            if cancel is not None and cancel.is_set():
                raise DecodingCancelledError("decoding was cancelled")
        try:
            worker = self.idle() or Worker()
            yield worker
            self.keep(worker)
        finally:
            self._free.release()

    def idle(self) -> Worker | None:
        """Take an idle worker, or return None if there is none."""
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread took it
                worker = self._idle.pop()
                if worker.usable:
                    return worker
                worker.end()
        return None

    def keep(self, worker: Worker) -> None:
        """Return a worker to the pool if it is still running."""
        if worker.usable:
            self._idle.append(worker)


STARTED: set[Worker] = set()
"""The workers of this process that have not been killed."""
_POOLS = {name: _Pool(num) for name, num in PROCESSES.items()}


def _end_all() -> None:
    for worker in list(STARTED):
        worker.end()


def _forget_all() -> None:
    """Forget all workers after a fork: their pipes belong to the parent."""
    STARTED.clear()
    _POOLS.update({name: _Pool(num) for name, num in PROCESSES.items()})


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
