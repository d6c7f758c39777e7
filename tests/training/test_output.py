"""What a training writes while it runs: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from mmllm.training import journal
from mmllm.training.trainer import train
from mmllm.utils.quiet import quiet_libraries

ALIGNED = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without the bars of transformers, as the command line is."""
    with quiet_libraries("transformers", errors_only=False):
        yield


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_file_gets_few_lines_and_no_bar(make_run, capsys, caplog, monkeypatch) -> None:
    monkeypatch.setattr(journal, "LOG_SECONDS", 0.0)
    with caplog.at_level("INFO", logger="mmllm"):
        train(make_run(prealign=ALIGNED, realign=ALIGNED))
    captured = capsys.readouterr()
    assert "\r" not in captured.err + captured.out
    steps = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [message.partition("  ")[0] for message in steps] == [
        f"step {number} of 4" for number in (2, 3, 4)
    ]
    assert all("loss" in message for message in steps)
    assert len(caplog.records) < 30


def test_a_terminal_has_one_bar_at_a_time(make_run, monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    # A command that ran in this process before has sent log records there.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    train(make_run(prealign=ALIGNED, realign=ALIGNED))
    written = terminal.getvalue()
    assert "\n" not in written
    names = [frame.partition(":")[0] for frame in re.split(r"[\r]", written) if frame.strip()]
    order = list(dict.fromkeys(names))
    assert order == ["frozen parts", "pre-alignment", "test"]
    assert names[-1] == "pre-alignment"  # the realignment has the line of the steps' bar
