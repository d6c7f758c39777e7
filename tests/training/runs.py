"""What a run has written: its metrics and the weights of its newest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmllm import checkpoints


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loss_curve(folder: Path) -> list[float]:
    """The training loss of each row of metrics.jsonl."""
    return [row["loss"] for row in metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """`file/name` -> each tensor of the newest checkpoint."""
    newest = checkpoints.open_checkpoint(folder).folder
    found = {}
    for file in sorted(newest.rglob("*.safetensors")):
        found |= {f"{file.stem}/{name}": value for name, value in load_file(file).items()}
    return found
