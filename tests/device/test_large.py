"""The benchmark of 8 billion parameters, narrow: its steps make the host wait for nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmllm.training.step import training_step
from tests.device.training import OnDevice, on_device
from tests.second_device import host_waits

__all__ = ["on_device"]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    try:
        import large
    finally:
        for name in ("large", "stages", "pairs"):
            sys.modules.pop(name, None)
    return large


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.usefixtures("auto_kernels")
def test_training_steps_do_not_synchronise(
    large: ModuleType, on_device: OnDevice, second: torch.device, monkeypatch, number: int
) -> None:
    on_device(second)
    stage = large.Large(number)
    monkeypatch.setattr(large, "POSITIONS", 512)
    monkeypatch.setattr(large, "CONVERSATIONS", 1)
    batch = large._batch(stage.model, stage.features, speaks=number == 3).to(second)
    with host_waits() as waits:
        found = training_step(
            stage.accelerator,
            stage.wrapped,
            stage.optimizer,
            large.StepData([batch]),
            stage.losses,
            stage.stage.max_grad_norm,
        )
    assert waits.total() == 0
    assert set(found()) == {"loss", "text", "align/image"} if number == 3 else {"loss", "text"}
