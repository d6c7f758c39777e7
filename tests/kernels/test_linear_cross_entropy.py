"""The loss of the head against plain autograd through logits that stand in memory whole."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.kernels import linear_cross_entropy as head
from mmllm.kernels.linear_cross_entropy import FrozenHead, LogitTransform
from mmllm.kernels.prepacked_linear import FrozenLinear

WIDTH, WORDS = 6, 11
SHAPES = [LogitTransform(), LogitTransform(scale=0.3), LogitTransform(scale=2.0, softcap=1.5)]


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


@pytest.fixture(params=["chunked", "fused"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "fused":
        for name in ("liger_kernel", "liger_kernel.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        module = ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
        module.fused_linear_cross_entropy_forward = liger_in_plain_torch  # pyright: ignore
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return request.param == "fused"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outputs", [0, 2])
@pytest.mark.parametrize("positions", [0, 1, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_losses_and_gradients_are_those_of_plain_autograd(
    shape, outputs, positions, biased, fused, monkeypatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_SIZE", 4)
    torch.manual_seed(positions)
    words, bias = torch.randn(WORDS, WIDTH), torch.randn(WORDS) if biased else None
    rows = torch.randn(outputs, WIDTH, requires_grad=True)
    hidden = torch.randn(positions, WIDTH, requires_grad=True)
    labels = torch.arange(positions).flip(0) * 2 % (WORDS + outputs)
    if positions > 1 and outputs:
        labels[:2] = torch.tensor([WORDS, WORDS + outputs - 1])
    scale = torch.rand(positions)  # each position counts differently

    def run(token_nll: Tensor) -> list[Tensor]:
        return [token_nll, *torch.autograd.grad((token_nll * scale).sum(), [hidden, rows])]

    logits = shape(torch.cat([F.linear(hidden, words, bias), hidden @ rows.T], dim=-1))
    wanted = run(F.cross_entropy(logits, labels, reduction="none"))
    found = run(FrozenHead(FrozenLinear(words, bias), rows, shape, fused).token_nll(hidden, labels))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        again = FrozenHead(FrozenLinear(words, bias), rows, shape, fused).token_nll(hidden, labels)
    torch.testing.assert_close(again, wanted[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outputs", [0, 2])
@pytest.mark.parametrize("positions", [0, 1, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_divergences_and_gradients_are_those_of_plain_autograd(
    shape, outputs, positions, biased, monkeypatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_SIZE", 4)
    monkeypatch.setattr(head, "BLOCK_SIZE", 3)
    torch.manual_seed(positions)
    words, bias = torch.randn(WORDS, WIDTH), torch.randn(WORDS) if biased else None
    rows = torch.randn(outputs, WIDTH, requires_grad=True)
    hidden = torch.randn(positions, WIDTH, requires_grad=True)
    fixed, scale = torch.randn(positions, WIDTH), torch.rand(positions)

    def run(kl: Tensor) -> list[Tensor]:
        return [kl, *torch.autograd.grad((kl * scale).sum(), [hidden, rows])]

    logits = shape(torch.cat([F.linear(hidden, words, bias), hidden @ rows.T], dim=-1))
    said = logits.log_softmax(-1)[:, :WORDS]
    wanted = shape(F.linear(fixed, words, bias)).log_softmax(-1)
    kl_divergence = F.kl_div(said, wanted, reduction="none", log_target=True).sum(-1)
    ours = FrozenHead(FrozenLinear(words, bias), rows, shape)
    for one, other in zip(run(ours.kl_divergence(hidden, fixed)), run(kl_divergence), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(ours.kl_divergence(hidden, fixed), kl_divergence)


def test_what_is_almost_certain_has_almost_no_gradient_in_bfloat16(fused) -> None:
    """p - 1 is small, and must not be the difference of two large rows that were rounded."""
    torch.manual_seed(0)
    words = torch.randn(WORDS, 64, dtype=torch.bfloat16)
    hidden = (2 * words[:3]).requires_grad_()
    rows = torch.zeros(1, 64, requires_grad=True)
    FrozenHead(FrozenLinear(words, None), rows, LogitTransform(), fused).token_nll(
        hidden, torch.arange(3)
    ).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-6 * words.abs().max()
