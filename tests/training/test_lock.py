"""One trainer per run folder: a live holder is named, a dead process holds none, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mmllm import checkpoints
from mmllm.errors import ConfigError, TrainingError
from mmllm.training import lock, setup, trainer
from mmllm.training.lock import Holder, RunLock
from mmllm.training.trainer import train
from mmllm.utils import files
from tests.faults import drafts

HOLD = """
import sys
from pathlib import Path
from mmllm.training.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of waiting, shortened."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 1.0)


def left_by(path: Path, seconds_ago: float, **changes) -> Holder:
    """Write the lock of a process on another machine, of this age."""
    here = RunLock(path).own
    found = replace(here, host="node-7", pid=4242, table="0000ffff", token="another", **changes)
    path.mkdir(parents=True, exist_ok=True)
    (path / lock.NAME).write_text(json.dumps(asdict(found)))
    then = time.time() - seconds_ago
    os.utime(path / lock.NAME, (then, then))
    return found


def test_a_second_trainer_is_refused_by_name_before_anything_is_loaded(
    holder, make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.models, "build", None)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        train(make_run(), resume=True, progress=False)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'run'}: process {holder.pid} on ")
    assert "trains into this folder" in message
    assert "stage.output=" in message
    assert sorted(tmp_path.rglob("*")) == before
    holder.communicate()  # its input ends, and so does its hold
    with RunLock(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_trainer_is_stale(holder, tmp_path: Path) -> None:
    """Also while its parent has not yet asked for its exit code."""
    holder.kill()
    deadline = time.monotonic() + 30
    while files.process_start_time(holder.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "run" / lock.NAME).is_file()
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()
    assert drafts(tmp_path) == []


def test_the_lock_of_a_reused_process_id_is_stale(tmp_path: Path) -> None:
    if not files.process_start_time(os.getpid()):
        pytest.skip("this system does not tell when a process began; its signs of life do")
    own = RunLock(tmp_path).own
    (tmp_path / lock.NAME).write_text(json.dumps(asdict(replace(own, start="1"))))
    with RunLock(tmp_path):
        pass
    with RunLock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
        RunLock(tmp_path).__enter__()


def test_the_lock_of_another_machine_is_held_while_its_heartbeat_is_fresh(
    tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "old"
    left_by(folder, seconds_ago=3600)
    with RunLock(folder):  # a job that was requeued on another machine
        assert "waiting" not in caplog.text

    folder = tmp_path / "fresh"
    left_by(folder, seconds_ago=0)
    began = time.monotonic()
    with RunLock(folder):
        assert time.monotonic() - began > 0.9
        assert "process 4242 on node-7" in caplog.text

    folder = tmp_path / "alive"
    left_by(folder, seconds_ago=0)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(folder / lock.NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"process 4242 on node-7 \(since 20.*trains into"):
            RunLock(folder).__enter__()
    finally:
        done.set()
        thread.join()
    assert drafts(tmp_path) == ["alive/train.lock"]


@pytest.mark.parametrize("content", [b"", bytes(200), b"{}", b"[1]", b"\xff\xfe", b'{"pid": "x"}'])
def test_an_unreadable_lock_is_held_while_it_is_fresh(
    tmp_path: Path, quick: None, content: bytes
) -> None:
    path = tmp_path / lock.NAME
    path.write_bytes(content)
    with RunLock(tmp_path) as held:
        held.check()
    assert not path.exists()


def test_the_holder_sends_heartbeats_and_restores_a_deleted_lock(
    tmp_path: Path, quick: None
) -> None:
    path = tmp_path / lock.NAME
    with RunLock(tmp_path) as held:
        os.utime(path, (1e9, 1e9))
        wait_until(lambda: time.time() - path.stat().st_mtime < 60)
        path.unlink()
        held.check()
        wait_until(path.exists)
        wait_until(lambda: json.loads(path.read_text() or "{}").get("token") == held.own.token)
    assert not path.exists()


def test_a_trainer_whose_folder_was_taken_writes_no_more(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was suspended for long, and another trainer has resumed from its checkpoint."""
    step, taken = trainer.training_step, []

    def suspended(*arguments, **options):
        taken.append(1)
        if len(taken) == 3:
            left_by(tmp_path / "run", seconds_ago=0)
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "training_step", suspended)
    with pytest.raises(TrainingError, match=r"process 4242 on node-7 .* has gone on with this run"):
        train(make_run(steps=8), progress=False)
    newest = checkpoints.latest(tmp_path / "run")
    assert newest is not None
    assert newest.step == 2
    kept = json.loads((tmp_path / "run" / lock.NAME).read_text())
    assert kept["token"] == "another", "the other one's lock is not its own to delete"


def test_a_stale_lock_is_taken_over_by_one_of_two_trainers(tmp_path: Path, quick: None) -> None:
    """The slower trainer would move the lock of the quicker one instead of the stale lock."""
    left_by(tmp_path, seconds_ago=3600)
    slow = RunLock(tmp_path)
    stale = slow.path.read_bytes()
    with RunLock(tmp_path) as first:
        lock.remove_stale(slow.path, stale)
        first.check()
        with pytest.raises(ConfigError, match="trains into this folder"):
            slow.__enter__()
    assert drafts(tmp_path) == []


def test_the_folder_is_free_after_the_end_and_after_an_error(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_run(steps=2), progress=False)
    assert drafts(tmp_path) == []
    with pytest.raises(ConfigError, match="already holds a run"):
        train(make_run(steps=2), progress=False)
    assert drafts(tmp_path) == []


def wait_until(done) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if done():
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    raise AssertionError("it did not come")
