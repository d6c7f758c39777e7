"""Activation functions of dictionaries that are trained: JumpReLU, and the largest of a batch.

Legend: B positions of a batch, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def jumprelu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Pre-activations above their thresholds, else 0: float[B, F] -> float[B, F].

    Thresholds get a gradient through a rectangular kernel (Rajamanoharan et al. 2024).

    Args:
        pre: float[B, F], pre-activations.
        threshold: float[F], positive.
        bandwidth: width of the kernel.
    """
    return _JumpReLU.apply(pre, threshold, bandwidth)


def step_function(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where pre-activations are above their thresholds, else 0: float[B, F] -> float[B, F]. Only
    thresholds get a gradient, as in `jumprelu`, whose arguments these are.

    Args:
        pre: float[B, F].
        threshold: float[F].
        bandwidth: width of the kernel.
    """
    return _Step.apply(pre, threshold, bandwidth)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of all positive values; 0 if there are no more than k.

    Args:
        values: float[…].
        k: from 1.

    Returns:
        float32[]
    """
    positive = values[values > 0]
    if len(positive) <= k:
        return torch.zeros((), device=values.device)
    return positive.float().kthvalue(len(positive) - k + 1).values


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre, threshold = ctx.saved_tensors
        near = _kernel(pre, threshold, ctx.bandwidth)
        return None, (-near * grads[0]).sum(dim=0), None


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre, threshold = ctx.saved_tensors
        near = _kernel(pre, threshold, ctx.bandwidth)
        jump = (-threshold * near * grads[0]).sum(dim=0)
        return grads[0] * (pre > threshold), jump, None


def _kernel(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 / bandwidth within half a bandwidth of the threshold, else 0."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth
