"""Adapters that train in fewer passes give what peft's give, or leave it to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from mmllm.kernels import lora_linear


def layer_of(dtype: torch.dtype = torch.float32, *, bias: bool = True, **options: Any) -> Any:
    """peft's layer around a frozen nn.Linear of 12 x 20, with adapters that do something."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(12, 20, bias=bias, dtype=dtype)).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], **options)
    config._register_custom_module({nn.Linear: lora_linear.fused_lora_linear()})
    layer: Any = get_peft_model(inner, config).base_model.model[0]  # pyright: ignore
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer.train()


def results(layer: Any, x: Tensor, forward: Any) -> list[Tensor]:
    """What comes out, and the gradients of what was read and of both matrices."""
    x = x.clone().requires_grad_()
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    out = forward(layer, x)
    slope = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out.float() * slope).sum(), [x, *weights])]


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_pefts(shape, bias) -> None:
    layer, x = layer_of(bias=bias), torch.randn(shape)
    for actual, expected in zip(
        results(layer, x, type(layer).forward), results(layer, x, Linear.forward), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_in_bfloat16_they_are_near_to_the_exact_ones() -> None:
    layer, x = layer_of(torch.bfloat16), torch.randn(64, 12).bfloat16()
    exact = results(layer.float(), x.float(), Linear.forward)
    layer = layer_of(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(layer, x, type(layer).forward)
        theirs = results(layer, x, Linear.forward)
    for actual, pefts, expected in zip(ours, theirs, exact, strict=True):
        assert actual.dtype == pefts.dtype
        error = (actual.float() - expected).norm()
        assert error <= 2 * (pefts.float() - expected).norm()
        assert error <= 0.01 * expected.norm()


def used(layer: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the fused pass computes it; that it is right is checked as well."""
    calls = []
    apply = lora_linear.LoRALinearFn.apply
    monkeypatch.setattr(
        lora_linear.LoRALinearFn, "apply", lambda *arguments: calls.append(1) or apply(*arguments)
    )
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out, Linear.forward(layer, x), atol=1e-4, rtol=1e-4)
    return bool(calls)


def test_unsupported_adapters_are_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 12)
    assert used(layer_of(), x, monkeypatch)
    assert used(layer_of(lora_dropout=0.5).eval(), x, monkeypatch)
    assert not used(layer_of(lora_dropout=0.5), x, monkeypatch)
    assert not used(layer_of(use_dora=True), x, monkeypatch)
    assert not used(layer_of(lora_bias=True), x, monkeypatch)
    trained = layer_of()
    trained.base_layer.weight.requires_grad_(True)
    assert not used(trained, x, monkeypatch)
    off = layer_of()
    off.enable_adapters(False)
    assert not used(off, x, monkeypatch)
    merged = layer_of()
    merged.merge()
    assert not used(merged, x, monkeypatch)
    with torch.no_grad():
        assert not used(layer_of(), x, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):  # float32 weights, which autocast casts
        assert not used(layer_of(), x, monkeypatch)
