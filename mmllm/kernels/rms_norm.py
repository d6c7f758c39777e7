"""Root mean square normalization (Zhang and Sennrich 2019), in float32 within.

Legend: N positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE = 128
"""Positions that a core's cache holds while they are added and normalized in training."""


@dataclass(frozen=True)
class RMSNorm:
    """The normalization for inference. `eps` float[1, 1] is added to the mean square."""

    weight: Tensor
    eps: Tensor

    @classmethod
    def of(cls, module: Any) -> RMSNorm:
        """Read one of transformers' RMSNorm modules; the weight is shared."""
        eps = torch.full((1, 1), module.variance_epsilon, device=module.weight.device)
        return cls(module.weight, eps)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize float[..., D]."""
        exact = x.float()
        if len(x) == 1 and x.ndim == 2:  # torch takes two steps more for it
            mean_square = torch.addmm(self.eps, exact, exact.t(), alpha=1 / x.shape[-1])
            return (exact * mean_square.rsqrt_()).to(x.dtype) * self.weight
        mean_square = torch.linalg.vecdot(exact, exact)[..., None] / x.shape[-1]
        return (exact * (mean_square + self.eps[0]).rsqrt_()).to(x.dtype) * self.weight


def add_rms_norm(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Add a residual and normalize the sum, in one pass over memory.

    Args:
        norm: one of transformers' RMSNorm modules.
        x: float[N, D].
        residual: float[N, D].

    Returns:
        The sum and its normalization, float[N, D] each.
    """
    return AddRMSNormFn.apply(x, residual, norm.weight, norm.variance_epsilon)  # pyright: ignore


class AddRMSNormFn(torch.autograd.Function):
    """`add_rms_norm` under autograd; the weight gets no gradient, and nothing of the positions is
    kept in float32 but 1 / RMS."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, inv_rms = torch.empty_like(x), torch.empty_like(x), torch.empty(len(x), 1)
        exact_weight = weight.float()
        for left, right, total_out, normed_out, scale in _blocks(
            x, residual, total, normed, inv_rms
        ):
            exact = torch.add(left, right, out=total_out).float()
            scale.copy_(torch.linalg.vecdot(exact, exact)[:, None])
            scale.div_(x.shape[1]).add_(eps).rsqrt_()
            normed_out.copy_((exact * scale).mul_(exact_weight))
        ctx.save_for_backward(total, inv_rms, exact_weight)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, inv_rms, weight = ctx.saved_tensors
        total_grad, normed_grad = grads
        grad = torch.empty_like(total)
        for value, scale, slope, grad_out in _blocks(total, inv_rms, normed_grad, grad):
            exact, slope = value.float(), slope.float() * weight
            share = torch.linalg.vecdot(exact, slope)[:, None] * scale.square() / total.shape[1]
            grad_out.copy_(slope.addcmul_(exact, share, value=-1).mul_(scale))
        if total_grad is not None:
            grad += total_grad
        return grad, grad, None, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over blocks of `BLOCK_SIZE` positions of all tensors at once."""
    return zip(*(tensor.split(BLOCK_SIZE) for tensor in tensors), strict=True)
