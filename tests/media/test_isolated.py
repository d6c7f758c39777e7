"""Decoding in processes of its own: the same media and errors, and an end to what has none."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from mmllm import media
from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.errors import MediaError, MissingMediaError, OversizedMediaError
from mmllm.media import Embedded, isolated
from tests.media.samples import MARK, gradient, many_frames, steps, tone

SOUND = Audio.from_numpy(tone(), 16_000)


@pytest.fixture(scope="module")
def slow() -> bytes:
    return many_frames()


@pytest.mark.parametrize(
    ("medium", "name"),
    [
        (Image.from_numpy(gradient(), provenance=MARK), "a.png"),
        (Audio.from_numpy(tone(), 16_000, provenance=MARK), "a.wav"),
        (Video.from_numpy(steps(), 8.0, audio=SOUND, provenance=MARK), "a.mp4"),
        (Video.from_numpy(steps(), 10.0), "a.gif"),
    ],
)
@pytest.mark.parametrize("form", ["path", "text", "relative", "bytes", "embedded"])
def test_what_is_decoded_is_what_the_library_decodes_here(
    medium: Medium, name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = medium.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    source: Any = {
        "path": path,
        "text": str(path),
        "relative": name,
        "bytes": path.read_bytes(),
        "embedded": Embedded(f"{name} of a row", path.read_bytes),
    }[form]
    given = type(medium)(source=source, caption="a cat")
    here, there = given.decoded(), given.decoded(isolated.decode)
    assert type(there) is type(here)
    assert (there.source, there.caption) == (source, "a cat")
    assert there.provenance == here.provenance
    assert np.array_equal(there.to_numpy(), here.to_numpy())
    assert there.to_numpy().dtype == here.to_numpy().dtype
    assert getattr(there, "sample_rate", None) == getattr(here, "sample_rate", None)
    assert isolated.probe(source) == media.probe(source)
    if isinstance(here, Video) and isinstance(there, Video):
        assert there.fps == here.fps
        assert np.array_equal(
            given.sample_frames(5, isolated.sample_frames), given.sample_frames(5)
        )
        assert (here.audio is None) == (there.audio is None)
        if here.audio is not None and there.audio is not None:
            assert there.audio.sample_rate == here.audio.sample_rate
            assert np.array_equal(there.audio.to_numpy(), here.audio.to_numpy())


@pytest.mark.parametrize(
    "source", [b"", b"hello", "nowhere.png", Path("/"), Embedded("row 3", lambda: b"x")]
)
def test_the_errors_are_the_same(source: Any) -> None:
    with pytest.raises(MediaError) as here:
        Image(source).decoded()
    with pytest.raises(MediaError) as there:
        Image(source).decoded(isolated.decode)
    assert str(there.value) == str(here.value)
    assert type(there.value) is type(here.value)


def test_limits_hold_there_too(tmp_path: Path) -> None:
    picture = Image.from_numpy(gradient()).save(tmp_path / "a.png")
    with media.limits(pixels=100), pytest.raises(OversizedMediaError, match="pixels"):
        Image(picture).decoded(isolated.decode)
    assert Image(picture).decoded(isolated.decode).to_numpy().shape == (24, 40, 3)
    with pytest.raises(MissingMediaError):
        Image(tmp_path / "b.png").decoded(isolated.decode)


def test_decoding_is_stopped_at_its_time_limit(slow: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(OversizedMediaError, match=r"not decoded within 0.3 s; make it smaller"):
        isolated.sample_frames(slow, 8, seconds=0.3)
    assert time.monotonic() - began < 10
    assert Image(_png()).decoded(isolated.decode).to_numpy().shape == (24, 40, 3)


def test_a_cancelled_caller_stops_the_decoding(slow: bytes) -> None:
    gone = threading.Event()
    timer = threading.Timer(0.3, gone.set)
    timer.start()
    began = time.monotonic()
    with pytest.raises(isolated.DecodingCancelledError):
        isolated.sample_frames(slow, 8, seconds=60, cancel=gone)
    assert time.monotonic() - began < 10


def test_slow_clips_do_not_delay_images(slow: bytes) -> None:
    gone = threading.Event()

    def look() -> None:
        with pytest.raises(isolated.DecodingCancelledError):
            isolated.sample_frames(slow, 8, seconds=60, cancel=gone)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    assert Image(_png()).decoded(isolated.decode).to_numpy().shape == (24, 40, 3)
    assert time.monotonic() - began < 10
    gone.set()
    for thread in threads:
        thread.join()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_crashed_process_costs_its_file_only(slow: bytes) -> None:
    isolated.start()
    before = set(isolated.STARTED)

    def kill() -> None:
        time.sleep(0.5)
        for process in before:
            os.kill(process.process.pid, signal.SIGKILL)
            process.process.wait()  # a process that is just being killed still looks alive

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(MediaError, match="broke down"):
        isolated.sample_frames(slow, 8, seconds=60)
    thread.join()
    assert Image(_png()).decoded(isolated.decode).to_numpy().shape == (24, 40, 3)
    assert before.isdisjoint(process for process in isolated.STARTED if process.usable)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded where the platform can")
def test_memory_is_bounded() -> None:
    code = (
        "from mmllm.media import Limits\n"
        "from mmllm.media.isolated.worker import bounded\n"
        "with bounded(60, Limits(decoded_bytes=2**20)):\n"
        "    try:\n"
        "        bytearray(2**31)\n"
        "    except MemoryError:\n"
        "        print('refused')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "refused\n"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """Even one that is killed in the middle of a file; and they import no torch."""
    code = (
        "import sys, threading, time\n"
        "from mmllm.conversation import Video\n"
        "from mmllm.media import isolated\n"
        "isolated.start()\n"
        "slow = Video(sys.argv[1])\n"
        "threading.Thread(target=isolated.sample_frames, args=(slow, 8)).start()\n"
        "time.sleep(0.5)\n"
        "print(*(entry.process.pid for entry in isolated.STARTED), flush=True)\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "slow.gif").write_bytes(many_frames())
    parent = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "slow.gif"], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    children = [Path("/proc") / number for number in parent.stdout.readline().split()]
    assert len(children) == 2
    for child in children:
        assert "torch" not in (child / "maps").read_text()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while any(_runs(child) for child in children):
        assert time.monotonic() < until, "they go on"
        time.sleep(0.05)


def _png() -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(gradient()).save(file, "PNG")
    return file.getvalue()


def _runs(process: Path) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
