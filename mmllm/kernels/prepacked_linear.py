"""Matrix products with frozen weights, which are packed once for oneDNN (bfloat16 on a CPU).

oneDNN reorders a weight into its own blocked layout at every product, for up to a third of the
product's time. A weight that does not train can be reordered once instead.

Legend: N rows, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_PREPACK_BYTES = 2 << 30
"""Size of a model up to which its weights may be kept in two packed copies more."""


class FrozenLinear:
    """Products with a weight float[O, I] and a bias (float[O] or None) that do not train."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute x @ weight.T + bias: float[N, I] -> float[N, O]"""
        return F.linear(x, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        """Compute the gradient with respect to the input: float[N, O] -> float[N, I]"""
        return grad @ self.weight


class PrepackedLinear(FrozenLinear):
    """A FrozenLinear with two more copies of its weight in oneDNN's blocked layout, one for the
    forward and one for the backward product."""

    @staticmethod
    def is_supported(weight: Tensor) -> bool:
        """Whether this machine has prepacked products for the weight's dtype and device."""
        return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and _has_onednn_bf16()

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight, bias)
        self._forward = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._backward = torch.ops.mkldnn._reorder_linear_weight(weight.detach().t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return _prepacked_linear(x, self._forward, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        return _prepacked_linear(grad, self._backward, None)


class PrepackCache:
    """The packed weight of one layer: packed at the first use, and again after the weight changed.

    Args:
        enabled: Whether weights may be packed; see `may_prepack`.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self._cached: tuple[Hashable, PrepackedLinear] | None = None

    def __call__(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        """Return the products with this weight, prepacked where that is supported."""
        if not self.enabled or not PrepackedLinear.is_supported(weight):
            return FrozenLinear(weight, bias)
        version = tensor_versions([weight])
        if self._cached is None or self._cached[0] != version:
            self._cached = version, PrepackedLinear(weight, bias)
        return self._cached[1]


def may_prepack(model: nn.Module) -> bool:
    """Whether the model is small enough to keep its weights in two packed copies more."""
    return sum(weight.nbytes for weight in model.parameters()) <= MAX_PREPACK_BYTES


def tensor_versions(tensors: Iterable[Tensor]) -> Hashable:
    """Return a key that changes when one of the tensors is modified in place or replaced. (Tensors
    that were made in inference mode do not count their modifications.)"""
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors
    )


@cache
def _has_onednn_bf16() -> bool:
    """Whether oneDNN has bfloat16 products here; only AVX-512 was measured."""
    if not torch.backends.mkldnn.is_available():
        return False
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return has_avx512 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _prepacked_linear(x: Tensor, packed_weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed_weight, bias, "none", [], "")
