"""Decoding in processes that can be ended: files of strangers, of which some take minutes, some
take gigabytes, and some crash the library that reads them.

    decode(medium, seconds=10)              as `mmllm.media.decode`
    sample_frames(video, 8, seconds=10)     as `mmllm.media.sample_frames`
    presample(video, [8], seconds=10)       the clip, with what `sample_frames` will be asked for
    probe(source, seconds=10)               as `mmllm.media.probe`

Each gives what its namesake gives, and raises MediaError too when the time is up, when the memory
is, when the process ended, or when `cancel` was set. The limits are those in force where it is
called (`mmllm.media.limits`). A few processes are started on first use and kept; one is ended with
the file that it could not cope with. They import neither torch nor the caller's main module, cannot
be reached by anybody else, and end with the process that started them. Answers are JSON and raw
arrays, never pickles: what has taken such a process over has not taken over the one that asked.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO, TypeVar

import numpy as np

from mmllm import errors, media
from mmllm.conversation import MEDIA, Audio, Embedded, Medium, Video
from mmllm.errors import MediaError, MmllmError, OversizedMediaError
from mmllm.media.files import MediaSource, name_of, opened
from mmllm.media.info import MediaInfo
from mmllm.media.limits import Limits, current_limits

M = TypeVar("M", bound=Medium)

SECONDS = 20.0
"""For one file, unless the caller says otherwise."""
PROCESSES = {"clips": 2, "others": 2}
"""At the same time: slow clips never keep pictures and sounds waiting."""
_START_SECONDS = 60.0
_POLL_SECONDS = 0.05
_OWN_MEMORY = 2**30
"""Bytes that a process may take besides what its limits let it decode: its libraries, the file, and
an intermediate of each kind (RGBA, float)."""
_COPIES = 4
"""How often what is decoded may be held at once."""
_COMMAND = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from mmllm.media.isolated import serve_parent; serve_parent()"
)
_LENGTHS = struct.Struct(">QQ")


class DecodingCancelledError(MediaError):
    """A medium whose decoding was ended by `cancel`."""


def decode(medium: M, *, seconds: float = SECONDS, cancel: threading.Event | None = None) -> M:
    """The medium with its `array` filled, as `mmllm.media.decode` gives it.

    Raises:
        MediaError: as there; also when it takes longer than `seconds`, too much memory, or ends
            the process that decodes it.
    """
    if medium.array is not None:
        return medium
    if medium.source is None:
        return media.decode(medium)  # says what is missing
    request = {"do": "decode", "modality": medium.modality}
    made, arrays = _ask(request, medium.source, _lane(medium), seconds, cancel)
    fields: dict[str, Any] = {**made["fields"], "array": arrays[0]}
    if made["audio"] is not None:
        fields["audio"] = Audio(array=arrays[1], **made["audio"])
    if medium.provenance is not None:
        fields["provenance"] = medium.provenance
    return replace(medium, **fields)


def sample_frames(
    video: Video, num: int, *, seconds: float = SECONDS, cancel: threading.Event | None = None
) -> np.ndarray:
    """uint8[num, H, W, 3], as `mmllm.media.sample_frames` gives them.

    Raises:
        MediaError: as `decode`.
    """
    if video.array is not None or video.source is None or num < 1:
        return media.sample_frames(video, num)
    request = {"do": "sample_frames", "num": num}
    return _ask(request, video.source, "clips", seconds, cancel)[1][0]


def presample(
    video: Video,
    nums: Iterable[int],
    *,
    seconds: float = SECONDS,
    cancel: threading.Event | None = None,
) -> Video:
    """The clip with those frames that `sample_frames` will be asked for, so that nobody else has to
    decode it: `nums` holds the number of each time.

    Raises:
        MediaError: as `decode`.
    """
    if video.array is not None:
        return video
    until = time.monotonic() + seconds
    found = {
        num: sample_frames(video, num, seconds=max(until - time.monotonic(), 0.0), cancel=cancel)
        for num in nums
    }
    return media.SampledVideo(
        source=video.source,
        caption=video.caption,
        provenance=video.provenance,
        fps=video.fps,
        audio=video.audio,
        sampled=found,
    )


def probe(
    source: MediaSource, *, seconds: float = SECONDS, cancel: threading.Event | None = None
) -> MediaInfo:
    """What a file is, as `mmllm.media.probe` says it.

    Raises:
        MediaError: as `decode`.
    """
    made, _ = _ask({"do": "probe"}, source, "others", seconds, cancel)
    return MediaInfo(**made["facts"])


def start() -> None:
    """Start one process for clips and one for others, so that the first file does not wait."""
    for lane in _LANES.values():
        lane.keep(lane.idle() or _Process())


# --- the side that asks -------------------------------------------------------------------------


def _lane(medium: Medium) -> str:
    return "clips" if isinstance(medium, Video) else "others"


def _ask(
    request: dict[str, Any],
    source: MediaSource,
    lane: str,
    seconds: float,
    cancel: threading.Event | None,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What a process answers to one request about one file, and the arrays that belong to it."""
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
    with _LANES[lane].process(cancel) as process:
        made, data = process.ask(request, body, seconds, cancel)
    if "error" in made:
        kind = getattr(errors, made["error"], MediaError)
        raise (kind if issubclass(kind, MediaError) else MediaError)(made["message"])
    return made, _arrays(made["arrays"], data)


def _arrays(facts: list[dict[str, Any]], data: bytearray) -> list[np.ndarray]:
    """The arrays that lie one behind the other in `data`."""
    arrays, start = [], 0
    for entry in facts:
        dtype, shape = np.dtype({"u1": np.uint8, "f4": np.float32}[entry["dtype"]]), entry["shape"]
        count = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(data, dtype, count, start).reshape(shape))
        start += count * dtype.itemsize
    return arrays


class _Process:
    """One process that decodes one file after the other."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        _STARTED.add(self)
        ready = self._within(_START_SECONDS, None, lambda: self._out.read(1))
        if ready != b"!":
            self.end()
            raise MmllmError("a process that decodes media did not start")

    @property
    def _out(self) -> BinaryIO:
        assert self._popen.stdout is not None
        return self._popen.stdout  # pyright: ignore[reportReturnType]

    @property
    def usable(self) -> bool:
        return self._popen.poll() is None

    def ask(
        self,
        request: dict[str, Any],
        body: bytes,
        seconds: float,
        cancel: threading.Event | None,
    ) -> tuple[dict[str, Any], bytearray]:
        """Its answer; MediaError, and the end of the process, where none comes in time."""
        name, most = request["name"], 2 * request["limits"]["decoded_bytes"] + _OWN_MEMORY

        def exchange() -> tuple[dict[str, Any], bytearray]:
            assert self._popen.stdin is not None
            _send(self._popen.stdin, request, body)
            return _receive(self._out, most)

        try:
            answer = self._within(seconds, cancel, exchange)
        except TimeoutError as error:
            raise OversizedMediaError(
                f"{name}: not decoded within {seconds:g} s; make it smaller, shorter or simpler"
            ) from error
        except InterruptedError as error:
            raise DecodingCancelledError(f"{name}: nobody waits for it any more") from error
        if answer is None:
            self.end()
            raise MediaError(
                f"{name}: the process that decoded it broke down; the file is damaged, or takes "
                "far more memory than its size lets expect"
            )
        return answer

    def _within(
        self, seconds: float, cancel: threading.Event | None, work: Callable[[], Any]
    ) -> Any:
        """What `work` gives; None if the process ended meanwhile. It is ended where the time is up
        (TimeoutError) or `cancel` is set (InterruptedError)."""
        found: list[Any] = []

        def run() -> None:
            with contextlib.suppress(OSError, ValueError, EOFError, struct.error):
                found.append(work())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        until = time.monotonic() + seconds
        while True:
            thread.join(_POLL_SECONDS)
            if not thread.is_alive():
                return found[0] if found else None
            gone = cancel is not None and cancel.is_set()
            if gone or time.monotonic() > until:
                self.end()
                thread.join()
                raise InterruptedError if gone else TimeoutError

    def end(self) -> None:
        """End it at once, whatever it does."""
        _STARTED.discard(self)
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(OSError):  # what was not written is lost, as it should be
                if pipe is not None:
                    pipe.close()


class _Lane:
    """A few processes for one kind of file, started when they are needed."""

    def __init__(self, num: int):
        self._free = threading.Semaphore(num)
        self._idle: list[_Process] = []

    @contextmanager
    def process(self, cancel: threading.Event | None) -> Iterator[_Process]:
        """A process that nobody else uses meanwhile."""
        while not self._free.acquire(timeout=_POLL_SECONDS):
            if cancel is not None and cancel.is_set():
                raise DecodingCancelledError("nobody waits for it any more")
        try:
            process = self.idle() or _Process()
            yield process
            self.keep(process)
        finally:
            self._free.release()

    def idle(self) -> _Process | None:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                process = self._idle.pop()
                if process.usable:
                    return process
                process.end()
        return None

    def keep(self, process: _Process) -> None:
        if process.usable:
            self._idle.append(process)


_STARTED: set[_Process] = set()
_LANES = {name: _Lane(num) for name, num in PROCESSES.items()}


def _end_all() -> None:
    for process in list(_STARTED):
        process.end()


def _forget_all() -> None:
    """A fork has pipes to its parent's processes, which are none of its own."""
    _STARTED.clear()
    _LANES.update({name: _Lane(num) for name, num in PROCESSES.items()})


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


# --- between the two ----------------------------------------------------------------------------


def _send(pipe: Any, header: dict[str, Any], *body: Any) -> None:
    """Two lengths, a JSON object, and the bytes of `body`."""
    text = json.dumps(header).encode()
    pipe.write(_LENGTHS.pack(len(text), sum(memoryview(part).nbytes for part in body)))
    pipe.write(text)
    for part in body:
        pipe.write(memoryview(part).cast("B"))
    pipe.flush()


def _receive(pipe: BinaryIO, most: int) -> tuple[dict[str, Any], bytearray]:
    text, data = _LENGTHS.unpack(_exactly(pipe, _LENGTHS.size))
    if text + data > most:
        raise EOFError  # whoever says so is not to be believed
    return json.loads(_exactly(pipe, text)), _exactly(pipe, data)


def _exactly(pipe: BinaryIO, length: int) -> bytearray:
    data = bytearray(length)
    view, start = memoryview(data), 0
    while start < length:
        num = pipe.readinto(view[start:])  # pyright: ignore[reportAttributeAccessIssue]
        if not num:
            raise EOFError
        start += num
    return data


# --- the side that decodes ----------------------------------------------------------------------


@dataclass
class _Answer:
    """`header` says what the arrays are."""

    header: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: list[np.ndarray] = dataclasses.field(default_factory=list)


def serve_parent() -> None:
    """Answer what comes from standard input, until it is closed. The main loop of a process."""
    _be_modest()
    answers = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # whatever a library prints is no answer
    _import_libraries()
    requests = _Requests(sys.stdin.buffer)  # pyright: ignore[reportArgumentType]
    answers.write(b"!")
    answers.flush()
    while True:
        request, body = requests.next()
        with _bounded(request["seconds"], Limits(**request["limits"])):
            answer = _answer(request, bytes(body))
        facts = [
            {"dtype": array.dtype.str[1:], "shape": list(array.shape)} for array in answer.arrays
        ]
        arrays = [np.ascontiguousarray(array) for array in answer.arrays]
        _send(answers, {**answer.header, "arrays": facts}, *arrays)


class _Requests:
    """Requests, read by a thread that ends the process as soon as nobody can ask any more."""

    def __init__(self, pipe: BinaryIO):
        self._pipe = pipe
        self._found: list[tuple[dict[str, Any], bytearray]] = []
        self._there = threading.Semaphore(0)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                self._found.append(_receive(self._pipe, sys.maxsize))
                self._there.release()
        finally:
            os._exit(0)

    def next(self) -> tuple[dict[str, Any], bytearray]:
        self._there.acquire()
        return self._found.pop()


def _answer(request: dict[str, Any], body: bytes) -> _Answer:
    """What `mmllm.media` says of a file."""
    name: str = request["name"]
    source: MediaSource = Embedded(name, lambda: body) if request["inside"] else name
    try:
        if request["folder"]:  # of the parent, which may have changed it
            os.chdir(request["folder"])
        with media.limits(Limits(**request["limits"])):
            return _DEEDS[request["do"]](request, source)
    except MediaError as error:
        return _Answer({"error": type(error).__name__, "message": str(error)})
    except MemoryError:
        message = f"{name}: takes more memory than is allowed; make it smaller"
        return _Answer({"error": "OversizedMediaError", "message": message})
    except Exception as error:  # whatever a library raises about a file
        what = f"{type(error).__name__}: {errors.quoted(str(error))}"
        return _Answer({"error": "MediaError", "message": f"{name}: cannot be read ({what})"})


def _decode(request: dict[str, Any], source: MediaSource) -> _Answer:
    medium = media.decode(MEDIA[request["modality"]](source=source))
    assert medium.array is not None
    fields = {
        name: getattr(medium, name)
        for name in ("provenance", "sample_rate", "fps")
        if hasattr(medium, name)
    }
    audio = getattr(medium, "audio", None)
    answer = _Answer({"fields": fields, "audio": None}, [medium.array])
    if audio is not None:
        answer.header["audio"] = {"sample_rate": audio.sample_rate}
        answer.arrays.append(audio.array)
    return answer


def _sample_frames(request: dict[str, Any], source: MediaSource) -> _Answer:
    return _Answer(arrays=[media.sample_frames(Video(source=source), request["num"])])


def _probe(request: dict[str, Any], source: MediaSource) -> _Answer:
    return _Answer({"facts": asdict(media.probe(source))})


_DEEDS = {"decode": _decode, "sample_frames": _sample_frames, "probe": _probe}


def _be_modest() -> None:
    """Leave Ctrl-C to the parent, and the processor to who computes answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(5)


def _import_libraries() -> None:
    """Before the first file comes."""
    import av
    import PIL.Image
    import soundfile

    PIL.Image.preinit()
    assert av
    assert soundfile


@contextmanager
def _bounded(seconds: float, limits: Limits) -> Iterator[None]:
    """Memory is bounded, where the platform can; and so is time, should the parent, which ends
    what takes too long, be gone itself."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        bound = _OWN_MEMORY + _COPIES * limits.decoded_bytes
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard != resource.RLIM_INFINITY:
            bound = min(bound, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    timer = getattr(signal, "setitimer", None)
    if timer is not None:
        timer(signal.ITIMER_REAL, seconds + 5)  # SIGALRM ends a process that does not expect it
    try:
        yield
    finally:
        if timer is not None:
            timer(signal.ITIMER_REAL, 0)
