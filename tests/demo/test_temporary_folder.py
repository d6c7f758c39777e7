"""The demo's folder ends with its process."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.processes import Process

ENDLESS = """
import os, sys, tempfile, types
from pathlib import Path
import gradio
from mmllm.demo import Demo

with gradio.Blocks() as blocks:
    gradio.Markdown("another page, which needs no model")
page = types.ModuleType("mmllm.demo.page")
page.CSS, page.theme, page.build = "", lambda: None, lambda *_, **__: blocks
sys.modules["mmllm.demo.page"] = page
tempfile.tempdir = sys.argv[1]
with Demo(None) as demo:
    (demo.sessions.open(None).folder / "secret.txt").write_text("secret")
    (Path(sys.argv[1]) / f"{os.getpid()}.ready").touch()
    demo.wait()
"""


def test_no_folder_outlives_its_demo(tmp_path: Path) -> None:
    """By Ctrl-C, by SIGTERM, by SIGHUP; and after kill -9 the next demo deletes it."""
    (tmp_path / "mmllm-demo-file").write_text("no folder")
    (tmp_path / "other").mkdir()

    def start() -> Process:
        return Process(["-c", ENDLESS, str(tmp_path)])

    def wait_for(process: Process) -> None:
        until = time.monotonic() + 300
        while not (tmp_path / f"{process.pid}.ready").is_file():
            assert process.returncode is None
            assert time.monotonic() < until
            time.sleep(0.02)
        (tmp_path / f"{process.pid}.ready").unlink()

    def count() -> int:
        return sum(path.is_dir() for path in tmp_path.glob("mmllm-demo-*"))

    ends = {
        signal.SIGKILL: -signal.SIGKILL,
        signal.SIGTERM: 128 + signal.SIGTERM,
        signal.SIGHUP: 128 + signal.SIGHUP,
        signal.SIGINT: 0,
    }
    processes = {number: start() for number in ends}
    try:
        for process in processes.values():
            wait_for(process)
        assert count() == 4
        for (number, process), left in zip(processes.items(), (4, 3, 2, 1), strict=True):
            process.send_signal(number)
            assert process.wait(60) == ends[number]
            assert count() == left  # what was killed leaves its own behind
        processes[signal.SIGTERM] = last = start()
        wait_for(last)
        assert count() == 1  # its own
        last.send_signal(signal.SIGTERM)
        assert last.wait(60) == 128 + signal.SIGTERM
    finally:
        for process in processes.values():
            process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mmllm-demo-file", "other"]
