"""One decoder layer for training on a CPU, in fewer passes over memory than transformers' modules.

These read and write the activations several times for a norm and once more for each sum, and have
every frozen weight reordered for every product. Here a residual sum and the norm after it are one
pass, and so is the rotation; nothing is kept in float32 for the gradient; frozen weights are packed
once (mmllm.kernels.prepacked_linear). The modules and weights are the model's own.

Legend: N positions, I input features, O output features, D width, H heads, E their width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmllm.kernels.forward_hooks import has_forward_hooks
from mmllm.kernels.lora_linear import frozen_linear, lora_linear, plain_adapter
from mmllm.kernels.prepacked_linear import PrepackCache
from mmllm.kernels.rms_norm import add_rms_norm
from mmllm.kernels.rope import RoPEFn


class TrainingLinear:
    """A linear layer of a module, under whatever adapter it has when it is called.

    Args:
        parent: The module that holds it.
        name: Its attribute there; read at every call.
        prepack: Whether its frozen weight may be packed.
    """

    def __init__(self, parent: nn.Module, name: str, *, prepack: bool):
        self.parent, self.name = parent, name
        self.packed = PrepackCache(prepack)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it: float[N, I] -> float[N, O]"""
        module: Any = getattr(self.parent, self.name)
        base = getattr(module, "base_layer", module)
        if type(base) is not nn.Linear or any(weight.requires_grad for weight in base.parameters()):
            return module(x)
        frozen = self.packed(base.weight, base.bias)
        if base is module or (module.disable_adapters and not module.merged):
            return frozen_linear(x, frozen)
        plain = plain_adapter(module)
        return module(x) if plain is None else lora_linear(x, frozen, *plain[1:])


class TrainingLayer:
    """Attention and gated MLP of one of transformers' layers."""

    def __init__(self, module: Any, *, prepack: bool):
        self.module = module
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            TrainingLinear(module.self_attn, f"{name}_proj", prepack=prepack) for name in "qkvo"
        )
        self.gate_proj, self.up_proj, self.down_proj = (
            TrainingLinear(module.mlp, f"{name}_proj", prepack=prepack)
            for name in ("gate", "up", "down")
        )

    def is_of(self, module: Any) -> bool:
        """Whether `module` is the layer that this was made of, with the same submodules."""
        parents = self.q_proj.parent, self.gate_proj.parent
        return module is self.module and parents == (module.self_attn, module.mlp)

    @property
    def input_norm(self) -> Any:
        """transformers' norm before the attention."""
        return self.module.input_layernorm

    def qkv(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute rotated queries, rotated keys, and values.

        Args:
            h: float[N, D], normalized hidden states.
            cos: the cosine table of `rope_cos_sin`.
            sin: the sine table.

        Returns:
            float[N, H, E] each; keys and values have fewer heads with grouped-query attention.
        """
        attention = self.module.self_attn
        q, k, v = (
            linear(h).view(len(h), -1, attention.head_dim)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = (RoPEFn.apply(heads, cos, sin) for heads in (q, k))  # pyright: ignore
        return q, k, v

    def add_attention(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Add the output projection to the residual stream, and normalize the sum for the MLP.

        Args:
            x: float[N, D], the residual stream.
            attended: float[N, H * E], the heads' outputs.

        Returns:
            The new residual stream and its normalization, float[N, D] each.
        """
        return add_rms_norm(self.module.post_attention_layernorm, x, self.o_proj(attended))

    def add_mlp(self, x: Tensor, h: Tensor, next_norm: Any) -> tuple[Tensor, Tensor]:
        """Add the MLP to the residual stream, and normalize the sum for what follows.

        Args:
            x: float[N, D], the residual stream.
            h: float[N, D], its normalization.
            next_norm: the norm of the next layer, or the last one.

        Returns:
            The new residual stream and its normalization, float[N, D] each.
        """
        gated = self.module.mlp.act_fn(self.gate_proj(h)) * self.up_proj(h)
        return add_rms_norm(next_norm, x, self.down_proj(gated))


def is_customized(module: Any) -> bool:
    """Whether a module has hooks, is compiled, or is a norm that trains: then its own forward has
    to run."""
    is_trained_norm = type(module).__name__.endswith("RMSNorm") and module.weight.requires_grad
    is_compiled = module._compiled_call_impl is not None
    return is_trained_norm or is_compiled or has_forward_hooks(module)
