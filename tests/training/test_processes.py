"""Several real processes: the same losses as one, whatever each of them happens to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mmllm import config
from tests import processes
from tests.processes import ROOT
from tests.training.runs import metrics

LOSSES = ("loss", "text", "align", "denoise", "kl")


WORKERS = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from mmllm.cli import main
from mmllm.training import journal, report

journal.plot_curves = lambda *_: None  # see make_run
report.panels = lambda _: {}

def work():
    sys.exit(main(["train", *sys.argv[2:]]))

shape = LaunchConfig(
    min_nodes=1,
    max_nodes=1,
    nproc_per_node=int(sys.argv[1]),
    rdzv_backend="c10d",
    rdzv_endpoint="localhost:0",
    max_restarts=0,
    start_method="fork",
)
elastic_launch(shape, work)()
"""
"""What `accelerate launch` does with configs/accelerate/cpu-N.yaml, its workers forked."""


def train_in(
    num_processes: int, run: config.RunConfig, folder: Path, *options: str
) -> list[dict[str, float]]:
    """Train a run in so many processes; its losses by step."""
    file = folder / f"{Path(run.stage.output).name}.yaml"
    file.write_text(yaml.safe_dump(config.dump(run)))
    done = processes.run(
        ["-c", WORKERS, str(num_processes), str(file), *options],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(run)


def launch(shape: str, run: config.RunConfig, folder: Path) -> list[dict[str, float]]:
    """`accelerate launch` on a run; its losses by step."""
    file = folder / f"{Path(run.stage.output).name}.yaml"
    file.write_text(yaml.safe_dump(config.dump(run)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [
        str(ROOT / "configs" / "accelerate" / f"{shape}.yaml"),
        str(ROOT / "train/train.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(file)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(run)


def losses(run: config.RunConfig) -> list[dict[str, float]]:
    rows = metrics(Path(run.stage.output))
    return [{k: v for k, v in row.items() if k.startswith(LOSSES)} for row in rows]


@pytest.mark.parametrize("cache", ["memory", "folder"])
def test_two_processes_have_the_losses_of_one(make_run, tmp_path: Path, cache: str) -> None:
    """Four conversations a step of six kinds: most steps, each process sees other modalities than
    the other one, and none of some; with accumulation every micro-batch is a single one."""
    curves = []
    for number in (1, 2):
        changes = {"cache": str(tmp_path / f"cache-{number}") if cache == "folder" else "memory"}
        run = make_run(output=f"{number}", steps=6, gradient_accumulation_steps=2, **changes)
        if number == 2 and cache == "memory":  # the way that users take
            curves.append(launch("cpu-2", run, tmp_path))
        else:
            curves.append(train_in(number, run, tmp_path))
    assert len(curves[0]) == len(curves[1]) == 6
    for one, two in zip(*curves, strict=True):
        assert one.keys() == two.keys()
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


def test_processes_without_media_do_not_block_the_others(make_run, tmp_path: Path) -> None:
    """In each step one process has images and the other one only text."""
    talk = tmp_path / "talk.jsonl"
    row = {
        "messages": [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello world."},
        ]
    }
    talk.write_text(json.dumps(row) + "\n")
    run = make_run(output="mixed", steps=4, batch_size=2, gradient_accumulation_steps=1)
    data = {
        "pictures": run.stage.data["understand-image"],
        "talk": config.parse_component(
            "data", {"type": "dialogues", "file": str(talk)}, "data.talk"
        ),
    }
    run = replace(run, stage=replace(run.stage, data=data))
    assert len(train_in(2, run, tmp_path)) == 4


@pytest.mark.parametrize(
    "changes", [{}, {"length_window": 3}, {"pack": True, "batch_size": 8}], ids=str
)
def test_a_run_goes_on_in_another_number_of_processes(
    make_run, tmp_path: Path, changes: dict
) -> None:
    """One process, then two, then one again: the batches and losses of a run that never stopped."""
    # A constant learning rate: the schedule must not see where the run pauses.
    constant = {"schedule": "constant", "warmup_ratio": 0.0, **changes}
    whole = train_in(1, make_run(output="whole", steps=6, **constant), tmp_path)
    curve: list[dict[str, float]] = []
    for number, steps in ((1, 2), (2, 4), (1, 6)):
        run = make_run(output="moved", steps=steps, **constant)
        curve = train_in(number, run, tmp_path, *(["--resume"] if steps > 2 else []))
    assert [set(one) for one in curve] == [set(one) for one in whole]
    for one, other in zip(whole, curve, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
