"""JumpReLU's gradient, and the largest of a batch against a sort."""

from __future__ import annotations

import pytest
import torch

from mmllm.insight.dictionary.activation import jumprelu, kth_largest, step_function


def test_the_gradient_of_jumprelu() -> None:
    """Within the kernel the threshold's gradient is -threshold / bandwidth; pre-activations above
    it get theirs unchanged."""
    pre = torch.tensor([[0.4, 1.1], [2.0, 1.3]], requires_grad=True)
    threshold = torch.tensor([0.5, 1.2], requires_grad=True)
    value = jumprelu(pre, threshold, 0.5)
    assert value.tolist() == [[0.0, 0.0], [2.0, pytest.approx(1.3)]]
    (value.sum() + step_function(pre, threshold, 0.5).sum()).backward()
    assert pre.grad is not None
    assert threshold.grad is not None
    assert pre.grad.tolist() == [[0, 0], [1, 1]]
    assert threshold.grad.tolist() == [pytest.approx(-1.0 - 2), pytest.approx(-4.8 - 4)]


def test_kth_largest_equals_a_sort() -> None:
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    positive = values.flatten().sort(descending=True).values
    for k in (1, 10, 100):
        assert kth_largest(values, k) == positive[k - 1]
    assert kth_largest(values, 10**6) == 0
