"""Products with weights that do not train.

Legend: N rows, I width read, O width given.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 2 << 30
"""Bytes of a model whose weights may be kept in two copies more."""


class Frozen:
    """Products with a weight float[O, I], and a bias float[O] or None, that do not train."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """float[N, I] -> float[N, O]"""
        return F.linear(x, self.weight, self.bias)

    def backward(self, gradient: Tensor) -> Tensor:
        """float[N, O] -> float[N, I]"""
        return gradient @ self.weight


class LaidOut(Frozen):
    """The same, of a weight in bfloat16 on a CPU that is kept once more for each direction, laid
    out as oneDNN's products read it: they do so every time otherwise, for up to a third of theirs.
    """

    @staticmethod
    def can(weight: Tensor) -> bool:
        """Whether this machine has such products for it."""
        return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and _has_products()

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight, bias)
        self._forward = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._backward = torch.ops.mkldnn._reorder_linear_weight(weight.detach().t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self._forward, self.bias)

    def backward(self, gradient: Tensor) -> Tensor:
        return _product(gradient, self._backward, None)


class Products:
    """Those of one layer. `small`: of a model whose weights may be kept in two copies more; they
    are made when they are first asked for, and again when the weight was changed."""

    def __init__(self, small: bool):
        self.small = small
        self._kept: tuple[Hashable, LaidOut] | None = None

    def __call__(self, weight: Tensor, bias: Tensor | None) -> Frozen:
        if not self.small or not LaidOut.can(weight):
            return Frozen(weight, bias)
        state = versions([weight])
        if self._kept is None or self._kept[0] != state:
            self._kept = state, LaidOut(weight, bias)
        return self._kept[1]


def is_small(model: nn.Module) -> bool:
    return sum(weight.nbytes for weight in model.parameters()) <= SMALL


@cache
def _has_products() -> bool:
    """Of AVX-512, where they were measured."""
    if not torch.backends.mkldnn.is_available():
        return False
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return wide and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _product(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), laid_out, bias, "none", [], "")


def versions(weights: Iterable[Tensor]) -> Hashable:
    """Equal as long as none of them was changed in place or replaced; tensors that were made in
    inference mode do not tell."""
    return tuple(
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights
    )
