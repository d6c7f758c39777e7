"""LoRA layers (Hu et al. 2021) that train in fewer passes over memory than peft's own.

peft casts the input of a layer to the adapter's dtype, which autocast undoes, and scales and adds
the adapter's output in separate passes, forward and backward. Here a frozen linear layer and its
adapter are one autograd function.

Legend: N positions, I input features, O output features, R rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.kernels.backend import UsesKernels
from mmllm.kernels.prepacked_linear import FrozenLinear
from mmllm.utils.imports import deferred_imports


def plain_adapter(module: Any) -> tuple[nn.Linear, Tensor, Tensor, float] | None:
    """Read the adapter of one of peft's layers if its output is exactly base(x) + up(down(x)) * s.

    Args:
        module: Any module.

    Returns:
        The base layer, `down` [R, I], `up` [O, R] and the scale; None for another module, or for an
        adapter that is merged, disabled, or more than plain LoRA (DoRA, dropout, a bias, several).
    """
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
def fused_lora_linear() -> type[nn.Module]:
    """Return a subclass of peft's LoRA layer for `nn.Linear` that trains in fewer passes. (It is
    made in a function because importing peft takes a second.)"""
    with deferred_imports("bitsandbytes"):  # which takes longer than peft
        from peft.tuners.lora.layer import Linear

    class FusedLoRALinear(UsesKernels, Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            is_plain_call = self.kernels == "auto" and not args and not kwargs
            plain = plain_adapter(self) if is_plain_call else None
            if plain is None or not torch.is_grad_enabled() or not _has_dtype_of(x, plain[0]):
                return super().forward(x, *args, **kwargs)
            base, down, up, scale = plain
            return lora_linear(x, FrozenLinear(base.weight, base.bias), down, up, scale)

    return FusedLoRALinear


def is_autocast(x: Tensor) -> bool:
    """Whether autocast would cast this input of a matrix product to another dtype."""
    device_type = x.device.type
    return (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) != x.dtype
    )


def lora_linear(x: Tensor, base: FrozenLinear, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Compute base(x) + x @ down.T @ up.T * scale.

    Args:
        x: float[..., I].
        base: The frozen layer.
        down: float[R, I], trained.
        up: float[O, R], trained.
        scale: The adapter's scale, alpha / rank for plain LoRA.

    Returns:
        float[..., O] in the dtype of `x`.
    """
    return LoRALinearFn.apply(x, base, down.to(x.dtype), up.to(x.dtype), scale)  # pyright: ignore


def frozen_linear(x: Tensor, base: FrozenLinear) -> Tensor:
    """Apply a frozen linear layer, with a gradient for its input only.

    Args:
        x: float[..., I].
        base: the layer's weights, prepacked or plain.

    Returns:
        float[..., O].
    """
    return FrozenLinearFn.apply(x, base)  # pyright: ignore


def _has_dtype_of(x: Tensor, base: nn.Linear) -> bool:
    """Whether the base layer is frozen and takes `x` without a cast."""
    weight = base.weight
    return x.dtype == weight.dtype and not weight.requires_grad and not is_autocast(x)


class FrozenLinearFn(torch.autograd.Function):
    """A FrozenLinear under autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: FrozenLinear) -> Tensor:  # pyright: ignore
        ctx.base = base
        return base.forward(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_grad = ctx.base.backward(grads[0].flatten(0, -2))
        return x_grad.view(*grads[0].shape[:-1], -1), None


class LoRALinearFn(torch.autograd.Function):
    """A FrozenLinear and its adapter under autograd; see `lora_linear`."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: Tensor, base: FrozenLinear, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        flat = x.flatten(0, -2)
        low_rank = flat @ down.T  # [N, R]
        ctx.save_for_backward(flat, down, up, low_rank)
        ctx.base, ctx.scale = base, scale
        return base.forward(flat).addmm_(low_rank, up.T, alpha=scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, down, up, low_rank = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        low_rank_grad = (grad @ up).mul_(ctx.scale)  # [N, R]
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = ctx.base.backward(grad).addmm_(low_rank_grad, down)
            x_grad = x_grad.view(*grads[0].shape[:-1], -1)
        up_grad = (grad.T @ low_rank).mul_(ctx.scale)
        return x_grad, None, low_rank_grad.T @ flat, up_grad, None
