"""The losses of a head against plain autograd through whole logits."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.kernels import linear_cross_entropy
from mmllm.kernels.linear_cross_entropy import FrozenHead, LogitTransform
from mmllm.kernels.prepacked_linear import FrozenLinear
from mmllm.kernels.reference import ReferenceHead

WIDTH, VOCAB = 6, 11
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.3), LogitTransform(scale=2.0, softcap=1.5)]


def liger_in_plain_torch(
    states: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    reduction: str,
    softcap: float | None,
    compute_gradients: bool,
    weight_requires_grad: bool,
) -> tuple[Tensor | None, ...]:
    """What `fused_linear_cross_entropy_forward` of Liger 0.8.5 returns, by autograd."""
    assert reduction == "none"
    assert not weight_requires_grad
    with torch.enable_grad():
        states = states.detach().requires_grad_()
        logits = F.linear(states, weight, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        loss = F.cross_entropy(logits, target, reduction="none")
        by_states = torch.autograd.grad(loss.sum(), states)[0] if compute_gradients else None
    return loss.detach(), None, None, None, by_states, None, None


@pytest.fixture(params=["chunked", "liger"])
def liger(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "liger":
        for name in ("liger_kernel", "liger_kernel.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        module = ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
        module.fused_linear_cross_entropy_forward = liger_in_plain_torch  # pyright: ignore
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return request.param == "liger"


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("outputs", [0, 2])
@pytest.mark.parametrize("positions", [0, 1, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_losses_and_gradients_are_those_of_plain_autograd(
    transform, outputs, positions, biased, liger, monkeypatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_SIZE", 4)
    torch.manual_seed(positions)
    vocab, bias = torch.randn(VOCAB, WIDTH), torch.randn(VOCAB) if biased else None
    signal_head = torch.randn(outputs, WIDTH, requires_grad=True)
    hidden = torch.randn(positions, WIDTH, requires_grad=True)
    labels = torch.arange(positions).flip(0) * 2 % (VOCAB + outputs)
    if positions > 1 and outputs:
        labels[:2] = torch.tensor([VOCAB, VOCAB + outputs - 1])
    scale = torch.rand(positions)  # each position counts differently

    def run(token_nll: Tensor) -> list[Tensor]:
        return [token_nll, *torch.autograd.grad((token_nll * scale).sum(), [hidden, signal_head])]

    def logits(states: Tensor) -> Tensor:
        return transform(torch.cat([F.linear(states, vocab, bias), states @ signal_head.T], dim=-1))

    head = FrozenHead(FrozenLinear(vocab, bias), signal_head, transform, liger)
    expected = run(ReferenceHead(logits, VOCAB).token_nll(hidden, labels))
    for value, expected_value in zip(run(head.token_nll(hidden, labels)), expected, strict=True):
        torch.testing.assert_close(value, expected_value)
    with torch.no_grad():
        torch.testing.assert_close(head.token_nll(hidden, labels), expected[0])


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("outputs", [0, 2])
@pytest.mark.parametrize("positions", [0, 1, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_divergences_and_gradients_are_those_of_plain_autograd(
    transform, outputs, positions, biased, monkeypatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_SIZE", 4)
    monkeypatch.setattr(linear_cross_entropy, "BLOCK_SIZE", 3)
    torch.manual_seed(positions)
    vocab, bias = torch.randn(VOCAB, WIDTH), torch.randn(VOCAB) if biased else None
    signal_head = torch.randn(outputs, WIDTH, requires_grad=True)
    hidden = torch.randn(positions, WIDTH, requires_grad=True)
    base_hidden, scale = torch.randn(positions, WIDTH), torch.rand(positions)

    def run(kl: Tensor) -> list[Tensor]:
        return [kl, *torch.autograd.grad((kl * scale).sum(), [hidden, signal_head])]

    def logits(states: Tensor) -> Tensor:
        return transform(torch.cat([F.linear(states, vocab, bias), states @ signal_head.T], dim=-1))

    head = FrozenHead(FrozenLinear(vocab, bias), signal_head, transform)
    actual = run(head.kl_divergence(hidden, base_hidden))
    expected = run(ReferenceHead(logits, VOCAB).kl_divergence(hidden, base_hidden))
    for value, expected_value in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, expected_value)
    with torch.no_grad():
        torch.testing.assert_close(head.kl_divergence(hidden, base_hidden), expected[0])


def test_what_is_almost_certain_has_almost_no_gradient_in_bfloat16(liger) -> None:
    """p - 1 is small, and must not be the difference of two large rows that were rounded."""
    torch.manual_seed(0)
    vocab = torch.randn(VOCAB, 64, dtype=torch.bfloat16)
    hidden = (2 * vocab[:3]).requires_grad_()
    signal_head = torch.zeros(1, 64, requires_grad=True)
    FrozenHead(FrozenLinear(vocab, None), signal_head, LogitTransform(), liger).token_nll(
        hidden, torch.arange(3)
    ).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-6 * vocab.abs().max()
