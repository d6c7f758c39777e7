"""Progress bars on a pseudo-terminal, in a file, and as parts of `make demo`."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mmllm.config import load_run
from mmllm.utils.progress import PARTS

ROOT = Path(__file__).parents[2]
PROGRAM = """
from mmllm.utils.progress import progress_bar

with progress_bar("instruction_tuning", total=4, unit="step") as outer:
    for _ in range(4):
        outer.update()
        outer.refresh()
    with progress_bar("pre-alignment: hidden states", total=2, unit="batch") as inner:
        for _ in range(2):
            inner.update()
            inner.refresh()
            outer.refresh()
"""


def run(*, terminal: bool, part: str = "") -> str:
    """What PROGRAM writes to stderr, a terminal of 120 columns or a pipe."""
    variables = {"MMLLM_PART": part, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    command, environment = [sys.executable, "-c", PROGRAM], {**os.environ, **variables}
    if not terminal:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return done.stdout + done.stderr
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with subprocess.Popen(command, stderr=other, env=environment) as process:
        os.close(other)
        written = b""
        try:
            while data := os.read(main, 4096):
                written += data
        except OSError:  # Linux: the other end is closed
            pass
    os.close(main)
    assert process.returncode == 0
    return written.decode()


def test_one_line_of_a_terminal_is_redrawn() -> None:
    written = run(terminal=True)
    assert "\n" not in written
    assert "\x1b[A" not in written  # no second line either
    frames = [frame.strip() for frame in written.split("\r") if frame.strip()]
    names = [frame.partition(":")[0] for frame in frames]
    assert {*names} == {"instruction_tuning", "pre-alignment"}
    first = names.index("pre-alignment")
    assert "pre-alignment" not in names[:first]
    assert "instruction_tuning" not in names[first:]  # hidden while the inner bar is shown
    assert written.split("\r")[-2].strip() == ""  # and nothing stays


def test_a_file_gets_no_bar() -> None:
    assert run(terminal=False, part="3/5") == ""


def test_a_part_of_the_demo_says_what_is_left_of_all() -> None:
    written = run(terminal=True, part="3/5")
    assert re.search(r"\[3/5\] stage 3 of 3, instruction_tuning: +\d+% \|", written)
    assert re.search(r"\[3/5\] stage 3 of 3, pre-alignment: hidden states: .*2/2 ", written)
    assert re.search(r"about [1-9]\d* min left in all", written)


@pytest.mark.parametrize("part", ["", "0/5", "6/5", "2/4", "two"])
def test_another_command_is_no_part_of_the_demo(part: str) -> None:
    written = run(terminal=True, part=part)
    assert "4/4" in written
    assert "left in all" not in written
    assert "stage" not in written


def test_the_parts_are_the_stages_of_the_demo() -> None:
    files = sorted((ROOT / "configs" / "mini").glob("[1-3]_*.yaml"))
    assert len(files) == 3
    for file, (_, bars) in zip(files, PARTS, strict=False):
        assert load_run(file, ()).stage.name in bars
