"""SIGKILL at random moments, on a real process (the benchmark does it twenty times on mini)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from mmllm import config
from tests.processes import ROOT, Process


def test_a_killed_run_ends_as_one_that_never_stopped(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("kill", ROOT / "benchmarks" / "kill.py")
    assert spec is not None
    assert spec.loader is not None
    kill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill)
    run = make_run(steps=8, save_steps=1)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.dump(run)))
    monkeypatch.setattr(sys, "argv", ["kill.py", str(file), "--kills", "3"])
    monkeypatch.setattr(kill, "start", lambda arguments, log: Process(arguments, stderr=log))
    code = kill.main()
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "3 kills" in printed
    assert "losses and weights are equal" in printed
