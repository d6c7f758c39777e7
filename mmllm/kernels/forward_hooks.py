"""Detects forward hooks and replaced forwards (by accelerate, FSDP or a user).

Kernels that compute a layer without calling its module would bypass its hooks; where there is one,
the modules' own forward runs instead.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

_CAPTURING = "transformers.utils.output_capturing"
"""The module whose hooks collect the hidden states that `output_hidden_states` asks for."""


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether this module has a forward hook or pre-hook, or its forward was replaced. Submodules
    and hooks that torch registers for all modules do not count; see `ForwardHooks` for these."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class ForwardHooks:
    """A live view of the forward hooks of a module and its present submodules.

    It is true while there is a hook. It is evaluated before every step of generation: 0.05 ms for
    the 995 modules of `mini`.
    """

    def __init__(self, module: nn.Module):
        self._states: list[dict[str, Any]] = [vars(part) for part in module.modules()]

    def __bool__(self) -> bool:
        if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return True
        return any(_has_hooks(state) or "forward" in state for state in self._states)

    @property
    def may_alter_outputs(self) -> bool:
        """Whether a hook may read or change what is computed. accelerate's do not (they only move
        weights and inputs to a device), nor do those by which transformers collects hidden states
        that a caller has asked for, and which it leaves behind."""
        has_global = bool(
            torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
        )
        return has_global or any(
            _has_hooks(state) or ("forward" in state and "_hf_hook" not in state)
            for state in self._states
        )

    @property
    def fingerprint(self) -> Hashable:
        """A key that changes when a hook is added or removed."""
        hooked = [
            (
                index,
                *state["_forward_hooks"],
                *state["_forward_pre_hooks"],
                id(state.get("forward")),
            )
            for index, state in enumerate(self._states)
            if _has_hooks(state) or "forward" in state
        ]
        global_hooks = torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks
        return tuple(hooked), *(tuple(hooks) for hooks in global_hooks)


def _has_hooks(state: dict[str, Any]) -> bool:
    """Whether a module with these attributes has a hook or pre-hook other than transformers' own,
    which only collects outputs."""
    if state["_forward_pre_hooks"]:
        return True
    hooks = state["_forward_hooks"]
    return bool(hooks) and any(hook.__module__ != _CAPTURING for hook in hooks.values())
