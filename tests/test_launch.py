"""The Slurm script, with stand-ins for Slurm's own commands and for accelerate."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
STANDINS = {
    "scontrol": 'test "$1 $2 $3" = "show hostnames n[1-2]" && printf "n1\\nn2\\n"',
    "srun": 'for id in 0 1; do SLURM_NODEID=$id "$@"; done',
    "accelerate": 'printf "%s\\n" "$*"',
}


def test_slurm_starts_one_launcher_per_machine(tmp_path: Path) -> None:
    for name, body in STANDINS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    script = ROOT / "configs" / "accelerate" / "slurm.sh"
    done = subprocess.run(
        ["bash", str(script), "my config.yaml", "stage.steps=5"],
        capture_output=True,
        text=True,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    shape = "launch --config_file configs/accelerate/multi-node.yaml --num_machines 2"
    assert done.stdout.splitlines() == [
        f"{shape} --num_processes 8 --machine_rank {rank} --main_process_ip n1 "
        "train/train.py my config.yaml stage.steps=5 --resume"
        for rank in (0, 1)
    ]


def test_the_shape_that_slurm_names_exists() -> None:
    text = (ROOT / "configs" / "accelerate" / "slurm.sh").read_text(encoding="utf-8")
    for word in text.split():
        if word.startswith("configs/") and word.endswith((".yaml", ".sh")):
            assert (ROOT / word).is_file(), word
