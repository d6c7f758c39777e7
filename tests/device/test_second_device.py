"""The second device refuses what an accelerator refuses, and counts what makes its host wait."""

from __future__ import annotations

import pytest
import torch

from tests.second_device import host_waits


def test_results_stay_on_the_device_and_equal_the_cpus(second: torch.device) -> None:
    values = torch.arange(6.0).view(2, 3)
    product = values.to(second) @ values.to(second).T
    assert product.device == second
    assert product.tolist() == (values @ values.T).tolist()


def test_operations_that_mix_devices_are_refused(second: torch.device) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=second) + torch.ones(2)
    assert (torch.ones(2, device=second) * torch.tensor(3.0)).tolist() == [3, 3]  # a number


def test_numpy_is_refused(second: torch.device) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        torch.ones(2, device=second).numpy()


def test_what_makes_the_host_wait_is_counted(second: torch.device) -> None:
    tensor = torch.ones(3, device=second)
    with host_waits() as none:
        (tensor * 2).sum()
    with host_waits() as waits:
        tensor.cpu()
        tensor[0].item()
        tensor.tolist()
        bool(tensor.all())
        torch.zeros(3).copy_(tensor)
    assert none.total() == 0
    assert waits.total() == 5


def test_inference_mode_is_torchs_own_elsewhere() -> None:
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()


def test_inference_mode_only_turns_gradients_off_here(second: torch.device) -> None:
    weight = torch.ones(2, device=second, requires_grad=True)
    with torch.inference_mode():
        assert not torch.is_inference_mode_enabled()
        assert not (weight * 2).requires_grad
    assert (weight * 2).requires_grad
