"""Low-rank adapters (Hu et al. 2021) of peft's, without what peft computes around them in training:
it casts what a layer reads to the adapter's dtype, which autocast undoes, and scales and adds what
the adapter gives in passes of their own, forward and backward.

Legend: N positions, I width read, O width given, R rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def plain_adapter(module: Any) -> tuple[nn.Linear, Tensor, Tensor, float] | None:
    """The base layer, `down` [R, I], `up` [O, R] and the scale of one of peft's layers; None where
    it does more, or less, than to add up(down(x)) * scale."""
    base = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or module.merged or module.disable_adapters:
        return None
    (name,) = module.active_adapters if len(module.active_adapters) == 1 else ("",)
    if name not in module.lora_A or name in module.lora_variant:
        return None
    if module.training and type(module.lora_dropout[name]) is not nn.Identity:
        return None
    down, up = module.lora_A[name], module.lora_B[name]
    if type(down) is not nn.Linear or up.bias is not None:
        return None
    return base, down.weight, up.weight, module.scaling[name]


@cache
def adapted_linear() -> type[nn.Module]:
    """peft's layer for `nn.Linear`, which trains in fewer passes. (A function, because importing
    peft takes a second.)"""
    from peft.tuners.lora.layer import Linear

    class AdaptedLinear(Linear):
        def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            plain = None if arguments or options else plain_adapter(self)
            if plain is None or not torch.is_grad_enabled() or not _exact(x, plain[0].weight):
                return super().forward(x, *arguments, **options)
            base, down, up, scale = plain
            return adapted(x, Frozen(base.weight, base.bias), down, up, scale)

    return AdaptedLinear


def _exact(x: Tensor, weight: Tensor) -> bool:
    """Whether a frozen layer reads what it is given as it is."""
    return x.dtype == weight.dtype and not weight.requires_grad and not casts(x)


def casts(x: Tensor) -> bool:
    """Whether autocast would have products read it in another dtype."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype


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
        usual = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        return usual and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight, bias)
        self._forward = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._backward = torch.ops.mkldnn._reorder_linear_weight(weight.detach().t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self._forward, self.bias)

    def backward(self, gradient: Tensor) -> Tensor:
        return _product(gradient, self._backward, None)


def _product(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), laid_out, bias, "none", [], "")


def adapted(x: Tensor, frozen: Frozen, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """What a frozen layer and its adapter give: float[..., I], float[R, I], float[O, R]
    -> float[..., O]"""
    return _Adapted.apply(x, frozen, down.to(x.dtype), up.to(x.dtype), scale)  # pyright: ignore


def unadapted(x: Tensor, frozen: Frozen) -> Tensor:
    """What a frozen layer gives: float[..., I] -> float[..., O]"""
    return _Unadapted.apply(x, frozen)  # pyright: ignore


class _Unadapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen) -> Tensor:  # pyright: ignore
        ctx.frozen = frozen
        return frozen.forward(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_x = ctx.frozen.backward(gradients[0].flatten(0, -2))
        return by_x.view(*gradients[0].shape[:-1], -1), None


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: Tensor, frozen: Frozen, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        flat = x.flatten(0, -2)
        low = flat @ down.T  # [N, R]
        ctx.save_for_backward(flat, down, up, low)
        ctx.frozen, ctx.scale = frozen, scale
        return frozen.forward(flat).addmm_(low, up.T, alpha=scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, down, up, low = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        by_low = (gradient @ up).mul_(ctx.scale)  # [N, R]
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = ctx.frozen.backward(gradient).addmm_(by_low, down)
            by_x = by_x.view(*gradients[0].shape[:-1], -1)
        by_up = (gradient.T @ low).mul_(ctx.scale)
        return by_x, None, by_low.T @ flat, by_up, None
