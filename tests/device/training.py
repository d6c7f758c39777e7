"""Stages that are trained on a device and on the CPU, for tests/device and tests/gpu."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from mmllm.config import RunConfig
from mmllm.training import trainer
from tests.training.runs import metrics, weights

OnDevice = Callable[[torch.device], None]
ALL = {"*_projections.*": 1e-3, "llm.*": 1e-3}
STAGES: dict[str, dict[str, Any]] = {
    "encoder alignment": {"learning_rates": {"input_projections.*": 1e-3}, "losses": {"text": 1.0}},
    "decoder alignment": {
        "learning_rates": {
            "output_projections.*": 1e-3,
            "llm.signal_embeddings": 1e-3,
            "llm.signal_head": 1e-3,
        },
        "losses": {"text": 1.0, "align": 1.0, "denoise": 0.1},
    },
    "instruction tuning": {"learning_rates": ALL, "losses": {"text": 1.0, "align": 1.0}},
}
"""What the three stages of the paper train, all of them on both directions."""


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnDevice]:
    """`on_device(device)`: trainings from here on run there. accelerate takes it for the best
    device of this machine, which it keeps for the whole process."""

    def choose(device: torch.device) -> None:
        _forget()
        monkeypatch.setattr(PartialState, "default_device", property(lambda _: device))

    yield choose
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class TrainingResult:
    """What a run gave: `losses` and gradient `norms` by step, its weights, and what the host waited
    for in its steps."""

    folder: Path
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    waits: list[Counter[str]] = field(default_factory=list)


def trained(
    run: RunConfig,
    waiting: Callable[[], AbstractContextManager[Counter[str]]],
    *,
    resume: bool = False,
) -> TrainingResult:
    """`trainer.train`, with its norms and host waits recorded by `waiting`."""
    norms: list[Any] = []
    waits: list[Counter[str]] = []
    take, clip = trainer.training_step, Accelerator.clip_grad_norm_

    def watched_step(*arguments: Any, **options: Any) -> Any:
        with waiting() as counted:
            found = take(*arguments, **options)
        waits.append(counted)
        return found

    def watched_norm(*arguments: Any) -> Any:
        norms.append(clip(*arguments))
        return norms[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", watched_step)
        patch.setattr(Accelerator, "clip_grad_norm_", watched_norm)
        folder = trainer.train(run, resume=resume, progress=False)
    norms = [float(norm) for norm in norms]
    return TrainingResult(folder, curve(folder), norms, weights(folder), waits)


def curve(folder: Path) -> list[float]:
    """Losses by step, held-out losses included."""
    rows = metrics(folder)
    return [value for row in rows for name, value in sorted(row.items()) if name not in _NO_LOSS]


_NO_LOSS = ("step", "seconds")


def assert_alike(one: TrainingResult, other: TrainingResult, tolerance: float = 1e-4) -> None:
    """The same losses, norms and weights."""
    assert one.losses
    assert one.losses == pytest.approx(other.losses, rel=tolerance, abs=tolerance)
    assert one.norms == pytest.approx(other.norms, rel=tolerance, abs=tolerance)
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        found = other.weights[name]
        if name.endswith("in_proj_bias") and value.ndim:
            # Keys' own bias changes no attention: its gradient is rounding, a whole step for Adam.
            value, found = (torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in (value, found))
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance, msg=name)
