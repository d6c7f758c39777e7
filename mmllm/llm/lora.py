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

from mmllm.llm.frozen import Frozen


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
