"""SIGKILL at random moments, on a real process (the benchmark does it twenty times on mini)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from mmllm import config

ROOT = Path(__file__).parents[2]


def test_a_killed_run_ends_as_one_that_never_stopped(make_run, tmp_path: Path) -> None:
    run = make_run(steps=8, save_steps=1)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.dump(run)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), str(file), "--kills", "3"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 kills" in done.stdout
    assert "losses and weights are equal" in done.stdout
