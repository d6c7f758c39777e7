"""The program of a decoding worker: it answers requests from standard input until its end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import numpy as np

from mmllm import media
from mmllm.errors import MediaError, quoted
from mmllm.media.files import Embedded, MediaSource
from mmllm.media.info import MediaContent
from mmllm.media.isolated import wire
from mmllm.media.limits import Limits

_COPIES = 4
"""Number of copies of the decoded array that fit into the memory limit."""
_NICENESS = 5
_ALARM_SECONDS = 5
"""Seconds after the time limit at which a worker ends itself, in case its parent is gone."""


@dataclass
class _Response:
    """A response: a JSON object, and the arrays that it describes."""

    header: dict[str, Any] = field(default_factory=dict)
    arrays: list[np.ndarray] = field(default_factory=list)


def serve_parent() -> None:
    """Run the main loop of a worker."""
    _lower_priority()
    responses = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # output of libraries must not be read as a response
    _import_libraries()
    requests = _Requests(sys.stdin.buffer)  # pyright: ignore[reportArgumentType]
    responses.write(b"!")
    responses.flush()
    while True:
        request, body = requests.next()
        with bounded(request["seconds"], Limits(**request["limits"])):
            response = _respond(request, bytes(body))
        arrays = [np.ascontiguousarray(array) for array in response.arrays]
        header = {**response.header, "arrays": wire.describe_arrays(arrays)}
        wire.send(responses, header, *arrays)


@contextmanager
def bounded(seconds: float, limits: Limits) -> Iterator[None]:
    """Limit the memory and time of this process inside the block, where the platform supports it.

    Normally the parent kills a worker that takes too long; the alarm is for the case that the
    parent is gone.

    Args:
        seconds: time limit of the request.
        limits: its `decoded_bytes` determine the memory limit.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        bound = wire.OWN_MEMORY + _COPIES * limits.decoded_bytes
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard != resource.RLIM_INFINITY:
            bound = min(bound, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    timer = getattr(signal, "setitimer", None)
    if timer is not None:
        timer(signal.ITIMER_REAL, seconds + _ALARM_SECONDS)  # SIGALRM ends the process
    try:
        yield
    finally:
        if timer is not None:
            timer(signal.ITIMER_REAL, 0)


class _Requests:
    """The queue of requests, read by a thread that ends the process once the parent is gone."""

    def __init__(self, pipe: BinaryIO):
        self._pipe = pipe
        self._received: list[tuple[dict[str, Any], bytearray]] = []
        self._available = threading.Semaphore(0)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                self._received.append(wire.receive(self._pipe, sys.maxsize))
                self._available.release()
        finally:
            os._exit(0)

    def next(self) -> tuple[dict[str, Any], bytearray]:
        """Wait for the next request; return it with the bytes of its file."""
        self._available.acquire()
        return self._received.pop()


def _respond(request: dict[str, Any], body: bytes) -> _Response:
    """Perform the requested operation on one file; every error becomes a response."""
    name: str = request["name"]
    source: MediaSource = Embedded(name, lambda: body) if request["inside"] else name
    try:
        if request["folder"]:  # the parent's working folder, which may have changed
            os.chdir(request["folder"])
        with media.limits(Limits(**request["limits"])):
            return _OPERATIONS[request["do"]](request, source)
    except MediaError as error:
        return _Response({"error": type(error).__name__, "message": str(error)})
    except MemoryError:
        message = f"{name}: takes more memory than is allowed; make it smaller"
        return _Response({"error": "OversizedMediaError", "message": message})
    except Exception as error:  # libraries raise any exception for a malformed file
        what = f"{type(error).__name__}: {quoted(str(error))}"
        return _Response({"error": "MediaError", "message": f"{name}: cannot be read ({what})"})


def _decode(request: dict[str, Any], source: MediaSource) -> _Response:
    content = media.decode(source, request["modality"])
    response = _Response({"content": _header_of(content), "audio": None}, [content.array])
    if content.audio is not None:
        response.header["audio"] = _header_of(content.audio)
        response.arrays.append(content.audio.array)
    return response


def _header_of(content: MediaContent) -> dict[str, Any]:
    return {
        "sample_rate": content.sample_rate,
        "fps": content.fps,
        "provenance": content.provenance,
    }


def _sample_frames(request: dict[str, Any], source: MediaSource) -> _Response:
    return _Response(arrays=[media.sample_frames(source, request["num"])])


def _probe(request: dict[str, Any], source: MediaSource) -> _Response:
    return _Response({"info": asdict(media.probe(source))})


_OPERATIONS: dict[str, Callable[[dict[str, Any], MediaSource], _Response]] = {
    "decode": _decode,
    "sample_frames": _sample_frames,
    "probe": _probe,
}


def _lower_priority() -> None:
    """Ignore Ctrl-C, which the parent handles, and yield the CPU to the model."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(_NICENESS)


def _import_libraries() -> None:
    """Import the decoding libraries before the first file arrives."""
    import av
    import PIL.Image
    import soundfile

    PIL.Image.preinit()
    assert av
    assert soundfile
