"""Training on a second device: every kind of step as on the CPU, and none waits for the device."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm import checkpoints, config
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.training.precompute import fill_cache
from mmllm.training.trainer import dry_run
from tests import parts
from tests.device.training import STAGES, OnDevice, TrainingResult, assert_alike, on_device, trained
from tests.second_device import host_waits
from tests.training.conftest import data, make_run

__all__ = ["data", "make_run", "on_device"]

pytestmark = pytest.mark.usefixtures("auto_kernels")  # a mask makes transformers' layers wait

CPU = torch.device("cpu")

KINDS: dict[str, dict[str, Any]] = {
    **STAGES,
    "packed": {"pack": True},
    "recompute": {"gradient_checkpointing": True},
    "packed recompute": {"pack": True, "gradient_checkpointing": True},
    "one micro-batch": {"gradient_accumulation_steps": 1, "length_window": 2},
    "no cache": {"cache": "none"},
}


def on_both(
    make_run, on_device: OnDevice, second: torch.device, **changes: Any
) -> list[TrainingResult]:
    """The same run on the CPU and on the second device."""
    found = []
    for device in (CPU, second):
        on_device(device)
        run = make_run(output=device.type, **{"steps": 2, **changes})
        found.append(trained(run, host_waits))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_the_cpus_without_synchronising(
    make_run, on_device, second, kind: str
) -> None:
    cpu, other = on_both(make_run, on_device, second, **KINDS[kind])
    assert_alike(cpu, other)
    assert len(other.waits) == 2
    assert sum(other.waits, Counter()) == Counter()


@pytest.mark.parametrize("pack", [False, True])
def test_the_kl_loss_equals_the_cpus(
    make_run, on_device, second, tmp_path: Path, pack: bool
) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"text": "one two three four five six " * 9}))
    kl = {"file": str(plain), "length": 8, "batch_size": 4}
    losses = {"text": 1.0, "align": 1.0, "kl": 1.0}
    cpu, other = on_both(make_run, on_device, second, kl=kl, losses=losses, pack=pack)
    assert_alike(cpu, other)
    assert sum(other.waits, Counter()) == Counter()


def test_prealignment_and_realignment(make_run, on_device, second) -> None:
    few = {"steps": 3, "batch_size": 4}
    cpu, other = on_both(make_run, on_device, second, prealign=few, realign=few, steps=1)
    assert_alike(cpu, other)


def test_validation_and_what_comes_with_it(make_run, on_device, second) -> None:
    held = config.dump(make_run().stage.data["understand-image"])
    validation = {"every": 1, "batches": 2, "data": {"pictures": held}}
    samples = {"every": 2, "prompts": ["draw"]}
    changes = {"validation": validation, "best": "validation/text", "samples": samples}
    cpu, other = on_both(make_run, on_device, second, steps=2, **changes)
    assert_alike(cpu, other)
    assert (cpu.folder / "metrics.jsonl").read_text().count("validation/text") == 2
    folders = [cpu.folder / "best", other.folder / "best"]
    one, two = (checkpoints.open_checkpoint(folder).step for folder in folders)
    assert one == two
    assert list(other.folder.glob("samples/step-*/*.html"))


def test_caches_equal_the_cpus(make_run, on_device, second, tmp_path: Path) -> None:
    """A cache that one device has filled gives the other one bit-identical losses. The steps draw
    as often as there are rows, so that all are read, in the same batches."""
    losses = {"text": 1.0, "align": 1.0}  # to denoise, a decoder would be loaded within a step
    memory, other = on_both(make_run, on_device, second, losses=losses, batch_size=12)
    for device in (CPU, second):
        on_device(device)
        folder = tmp_path / f"cache-{device.type}"
        fill_cache(make_run(cache=str(folder)), progress=False)
    for cache in ("cache-cpu", "cache-second"):
        complete = {"cache": str(tmp_path / cache), "cache_complete": True, "losses": losses}
        run = make_run(output=f"from-{cache}", steps=2, batch_size=12, **complete)
        reading = trained(run, host_waits)
        assert reading.losses == other.losses
        assert sum(reading.waits, Counter()) == Counter()
    changes = {"cache": str(tmp_path / "new"), "losses": losses}
    filling = trained(make_run(output="fills", steps=2, batch_size=12, **changes), host_waits)
    assert filling.losses == other.losses
    assert_alike(memory, filling)


@pytest.mark.parametrize("begins", [CPU, None], ids=["on the CPU", "on the device"])
def test_a_run_goes_on_on_the_other_device(make_run, on_device, second, begins) -> None:
    constant = {"schedule": "constant", "warmup_ratio": 0.0}
    on_device(CPU)
    whole = trained(make_run(output="whole", steps=4, **constant), host_waits)
    first, then = (CPU, second) if begins else (second, CPU)
    for device, steps in ((first, 2), (then, 4)):
        on_device(device)
        run = make_run(output="moved", steps=steps, **constant)
        resumed = trained(run, host_waits, resume=steps == 4)
    whole.norms = whole.norms[2:]
    assert_alike(whole, resumed)


def test_resuming_there_is_exact(make_run, on_device, second) -> None:
    on_device(second)
    constant = {"schedule": "constant", "warmup_ratio": 0.0}
    whole = trained(make_run(output="whole", steps=4, **constant), host_waits)
    for steps in (2, 4):
        run = make_run(output="parts", steps=steps, **constant)
        resumed = trained(run, host_waits, resume=steps == 4)
    assert resumed.losses == whole.losses
    for name, value in whole.weights.items():
        assert torch.equal(resumed.weights[name], value), name


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_data_workers_leave_the_device_alone(
    make_run, on_device, second, monkeypatch, cache: str
) -> None:
    """They are forked, and CUDA cannot be used in a forked process: what was not asked before the
    first step (validation, captions that are drawn) is asked by the process that trains."""
    held = config.dump(make_run().stage.data["understand-audio"])
    validation = {"every": 2, "batches": 1, "data": {"held": held}}
    changes = {"cache": cache, "validation": validation, "steps": 2}
    on_device(CPU)
    cpu = trained(make_run(output="cpu", **changes), host_waits)
    on_device(second)
    trainer, forward = os.getpid(), parts.ColourEncoder.forward
    encode = ModalityDecoder.encode_captions

    def here(run):
        def asked(*arguments):
            assert os.getpid() == trainer, "a data worker used the device"
            return run(*arguments)

        return asked

    monkeypatch.setattr(parts.ColourEncoder, "forward", here(forward))
    monkeypatch.setattr(ModalityDecoder, "encode_captions", here(encode))
    run = make_run(output="workers", num_workers=2, **changes)
    assert_alike(cpu, trained(run, host_waits))


def test_a_dry_run_takes_a_step(make_run, on_device, second) -> None:
    on_device(second)
    dry_run(make_run(num_workers=1), progress=False)


def test_bfloat16_adds_no_synchronisation(make_run, on_device, second) -> None:
    cpu, other = on_both(make_run, on_device, second, precision="bf16", pack=True)
    assert cpu.losses == pytest.approx(other.losses, rel=0.05)
    assert sum(other.waits, Counter()) == Counter()
