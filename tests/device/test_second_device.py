"""The second device refuses what an accelerator refuses, and counts what makes its host wait."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.second_device import SecondTensor, host_waits


def test_results_stay_on_the_device_and_equal_the_cpus(second: torch.device) -> None:
    values = torch.arange(6.0).view(2, 3)
    product = values.to(second) @ values.to(second).T
    assert product.device == second
    assert product.tolist() == (values @ values.T).tolist()


def test_tensors_made_there_have_their_shape(second: torch.device) -> None:
    assert torch.arange(3, device=second).shape == (3,)
    assert torch.meshgrid(*[torch.arange(2.0, device=second)] * 2, indexing="ij")[0].shape == (2, 2)
    assert torch.eye(2, 3, device=second).tolist() == torch.eye(2, 3).tolist()
    assert torch.tril_indices(3, 3, device=second).shape == (2, 6)


def test_gradients_of_complex_products_are_the_cpus(second: torch.device) -> None:
    turn = torch.polar(torch.ones(3), torch.arange(3.0))
    found = []
    for device in ("cpu", second):
        x = torch.arange(6.0).view(3, 2).to(device).requires_grad_()
        rotated = torch.view_as_real(torch.view_as_complex(x * 2) * turn.to(device))
        (rotated * torch.arange(6.0).view(3, 2).to(device)).sum().backward()
        assert x.grad is not None
        found.append(x.grad.cpu())
    torch.testing.assert_close(*found)


def test_copies_of_modules_are_their_own(second: torch.device) -> None:
    module = torch.nn.Linear(2, 2).to(second)
    other = copy.deepcopy(module)
    with torch.no_grad():
        module.weight.zero_()
    assert isinstance(other.weight, torch.nn.Parameter)
    assert isinstance(other.weight.data, SecondTensor)
    assert other.weight.requires_grad
    assert other.weight.abs().sum().item() > 0


def test_operations_that_mix_devices_are_refused(second: torch.device) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=second) + torch.ones(2)
    assert (torch.ones(2, device=second) * torch.tensor(3.0)).tolist() == [3, 3]  # a number


def test_numpy_is_refused(second: torch.device) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        torch.ones(2, device=second).numpy()


def test_synchronisations_are_counted(second: torch.device) -> None:
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


def test_copies_wait_unless_they_are_non_blocking(second: torch.device) -> None:
    tensor = torch.ones(3, device=second)
    with host_waits() as waits:
        torch.ones(3).to(second)
        torch.tensor([1.0, 2.0], device=second)
        tensor.copy_(torch.zeros(3))
        tensor[torch.tensor([0, 1])]
    with host_waits() as none:
        torch.ones(3).to(second, non_blocking=True)
        tensor.copy_(torch.zeros(3), non_blocking=True)
        tensor.to("cpu", non_blocking=True)
        torch.tensor([], device=second)
        tensor.to(torch.float16).clone().copy_(tensor)
    assert waits.total() == 4
    assert none.total() == 0


def test_sizes_that_depend_on_values_make_the_host_wait(second: torch.device) -> None:
    tensor, mask = torch.ones(3, device=second), torch.ones(3, device=second) > 0
    with host_waits() as waits:
        tensor[mask]
        tensor[mask] = torch.zeros(3, device=second)
        tensor.masked_select(mask)
        tensor.unique()
    with host_waits() as none:
        tensor[mask] = 0.0
        tensor[torch.zeros(2, dtype=torch.long).to(second, non_blocking=True)]
        tensor[1] = 5.0
    assert waits.total() == 4
    assert none.total() == 0


def test_the_cpus_generators_are_refused(second: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, device=second, generator=generator)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.ones(3, device=second).multinomial(1, generator=generator)
    torch.randn(3, device=second)


def test_autocast_computes_products_in_its_own_type(second: torch.device) -> None:
    layer = torch.nn.Linear(3, 2).to(second)
    with torch.autocast(second.type, torch.bfloat16):
        found = layer(torch.ones(1, 3, device=second))
        assert (layer.weight + 1).dtype == torch.float32
    found.sum().backward()
    assert (found.dtype, found.device) == (torch.bfloat16, second)
    assert layer.weight.grad.dtype == torch.float32


def test_inference_mode_is_torchs_own_elsewhere() -> None:
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()


def test_inference_mode_only_turns_gradients_off_here(second: torch.device) -> None:
    weight = torch.ones(2, device=second, requires_grad=True)
    with torch.inference_mode():
        assert not torch.is_inference_mode_enabled()
        assert not (weight * 2).requires_grad
    assert (weight * 2).requires_grad
