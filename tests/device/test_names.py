"""Devices by name: one that is not here is refused with those that are."""

from __future__ import annotations

import pytest
import torch

import mmllm
from mmllm.errors import ConfigError
from mmllm.kernels import devices
from mmllm.kernels.devices import parse_device, to_device
from mmllm.kernels.precision import fast_autocast, fast_dtype
from mmllm.training.processes import make_accelerator
from mmllm.training.trainer import train
from tests.device.training import OnDevice, on_device
from tests.training.conftest import data, make_run

__all__ = ["data", "make_run", "on_device"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "an NVIDIA or AMD GPU is called cuda"),
        ("cuda", "cannot use|finds no GPU|built without CUDA"),
        ("cuda:7", r"here \(cpu.*got 'cuda:7'"),
        ("mps", r"here \(cpu.*got 'mps'"),
        ("cpu:1", "got 'cpu:1'"),
        ("cuda:x", "got 'cuda:x'"),
        ("", "got ''"),
        ("meta", "got 'meta'"),
        ("g" * 10_000, "got 'ggg"),
    ],
)
def test_a_device_that_is_not_here_is_refused(name: str, message: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False, raising=False)
    with pytest.raises(ConfigError, match=message) as caught:
        mmllm.load("mini", device=name)
    assert len(str(caught.value)) < 500


def test_devices_that_are_here_are_taken(second: torch.device, monkeypatch) -> None:
    assert parse_device("cpu") == "cpu"
    assert parse_device("second") == "second"
    monkeypatch.setattr(devices, "device_count", lambda kind: {"cpu": 1, "cuda": 2}.get(kind, 0))
    assert parse_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match=r"here \(cpu, cuda:0 to cuda:1\), got 'cuda:2'"):
        parse_device("cuda:2")


def test_precision_follows_the_device(monkeypatch) -> None:
    fast_dtype.cache_clear()
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert fast_dtype("cuda") is torch.float32  # before Ampere: in emulation alone
    assert fast_dtype("mps") is torch.float32
    fast_dtype.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_to_the_fast_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products in bfloat16 are emulated they took seven times as long as in float32."""
    monkeypatch.setattr("mmllm.kernels.precision.fast_dtype", lambda _: dtype)
    with fast_autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype


def test_what_is_moved_to_the_cpu_or_to_mps_is_there_at_once(monkeypatch) -> None:
    waits = []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda _self, _device, non_blocking: waits.append(not non_blocking)
    )
    for device in ("cpu", "mps", "second"):
        to_device(torch.ones(1), device)
    assert waits == [True, True, False]


def test_unsupported_settings_of_accelerate_are_refused(make_run, monkeypatch):
    run = make_run()
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{kind}", "true")
            with pytest.raises(ConfigError, match=rf"{kind} .*multi-gpu\.yaml"):
                train(run, progress=False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="got 'gpu'"):
        train(run, progress=False)


def test_half_precision_is_refused_where_it_would_be_left_out(
    make_run, on_device: OnDevice, second: torch.device
) -> None:
    on_device(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"stage\.precision: fp16 needs a GPU"):
        make_accelerator(make_run().stage, "fp16")
    on_device(second)
    with pytest.raises(ConfigError, match=r"stage\.precision: fp16 cannot be used here"):
        make_accelerator(make_run().stage, "fp16")
