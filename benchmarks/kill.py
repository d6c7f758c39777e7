"""Does a run that is killed again and again end as one that never stopped?

    python benchmarks/kill.py                                  # 20 kills, a quarter of an hour
    python benchmarks/kill.py CONFIG --kills 5 stage.steps=8   # another stage, fewer

Trains once in peace, then the same stage again under SIGKILL at random moments, loading and saving
included, each time going on with `--resume`. Exits with 1 unless all losses and all weights of the
last checkpoint are equal bit for bit, and nothing half done is left in the folder.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mmllm import console

MINI = "configs/mini/1_encoder_alignment.yaml"
QUICK = ["stage.steps=12", "stage.batch_size=4", "stage.save_steps=2", "stage.prealign=null"]
QUICK += ["stage.validation=null", "stage.samples=null"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default=MINI)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    overrides = options.overrides + (QUICK if options.config == MINI else [])
    command = ["-m", "mmllm", "train", options.config, *overrides]
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        started = time.monotonic()
        finished(command, whole, None)
        lasts = time.monotonic() - started
        kills = runs = 0
        while kills < options.kills:
            parts = Path(folder) / f"parts-{runs}"
            runs += 1
            while True:
                left = options.kills - kills
                delay = draw.uniform(0, lasts) if left else None
                if finished(command, parts, delay):
                    break
                kills += 1
                console.echo(f"kill {kills} after {delay:.2f} s: {state(parts)}")
            problems = differences(whole, parts)
            if problems:
                console.echo("\n".join(problems))
                return 1
        console.echo(f"{kills} kills in {runs} runs of {lasts:.1f} s: losses and weights are equal")
    return 0


def finished(command: list[str], output: Path, delay: float | None) -> bool:
    """Go on with a run; False if it had to be killed, after `delay` seconds."""
    log = output.with_suffix(".stderr")
    process = start([*command, f"stage.output={output}", "--resume"], log)
    try:
        code = process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if code:
        raise SystemExit(log.read_text())
    return True


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a Python program, its stderr in a file."""
    with log.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=stderr
        )


def state(run: Path) -> str:
    """The checkpoints of a killed run, by name."""
    names = sorted(path.name for path in (run / "checkpoints").glob("*"))
    return ", ".join(names) or "no checkpoint"


def differences(one: Path, other: Path) -> list[str]:
    """What is not equal: losses by step, files of weights; and what kills have left behind."""
    odd = {".partial", ".replaced", ".lock"}
    left = sorted(path for path in other.rglob("*") if path.suffix in odd)
    found = [f"{path.relative_to(other)}: left behind" for path in left]
    curves = [
        {row["step"]: {**row, "seconds": 0} for row in map(json.loads, text.splitlines())}
        for text in ((run / "metrics.jsonl").read_text() for run in (one, other))
    ]
    for step in sorted(curves[0].keys() | curves[1].keys()):
        rows = [curve.get(step) for curve in curves]
        if rows[0] != rows[1]:
            found.append(f"step {step}: {rows[0]} and {rows[1]}")
    last = [max((run / "checkpoints").glob("step-*")) for run in (one, other)]
    for path in sorted(last[0].rglob("*.safetensors")):
        twin = last[1] / path.relative_to(last[0])
        if not twin.is_file() or twin.read_bytes() != path.read_bytes():
            found.append(f"{path.relative_to(last[0])}: not equal")
    return found


if __name__ == "__main__":
    sys.exit(main())
