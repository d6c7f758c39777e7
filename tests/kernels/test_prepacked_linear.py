"""Prepacked weights give the products of those that are not packed."""

from __future__ import annotations

import pytest
import torch

from mmllm.kernels.prepacked_linear import FrozenLinear, PrepackCache, PrepackedLinear


@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_weight_gives_the_same_products(bias: bool) -> None:
    torch.manual_seed(0)
    weight, more = torch.randn(40, 24).bfloat16(), torch.randn(40).bfloat16() if bias else None
    x, gradient = torch.randn(33, 24).bfloat16(), torch.randn(40, 33).bfloat16().T
    plain, packed = FrozenLinear(weight, more), PrepackCache(enabled=True)(weight, more)
    assert isinstance(packed, PrepackedLinear) == PrepackedLinear.is_supported(weight)
    pairs = [
        (packed.forward(x), plain.forward(x)),
        (packed.backward(gradient), plain.backward(gradient)),
    ]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_made_once_and_follow_their_weight(dtype: torch.dtype) -> None:
    products, weight = PrepackCache(enabled=True), torch.randn(4, 3).to(dtype)
    first = products(weight, None)
    assert isinstance(first, PrepackedLinear) == PrepackedLinear.is_supported(weight)
    assert (products(weight, None) is first) == PrepackedLinear.is_supported(weight)
    weight.mul_(2)
    second = products(weight, None)
    assert second is not first
    assert second.forward(torch.eye(3).to(dtype)).equal(weight.T)
    assert products(weight.clone(), None) is not second
    assert type(PrepackCache(enabled=False)(weight, None)) is FrozenLinear
