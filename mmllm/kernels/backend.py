"""Which kernels a model uses: the fast paths (`auto`), or the reference by torch, transformers and
peft alone."""

from __future__ import annotations

import os
from typing import Literal, cast, get_args

from torch import nn

from mmllm.errors import ConfigError, quoted

Backend = Literal["auto", "reference"]
"""`auto` takes a fast path wherever it supports the model, the device and the dtypes."""
ENVIRONMENT_VARIABLE = "MMLLM_KERNELS"
"""The backend where neither a config nor an argument names one."""


def resolve_backend(backend: Backend | None = None) -> Backend:
    """Return the backend that is given, else that of the environment, else `auto`.

    Raises:
        ConfigError: The environment variable has another value.
    """
    name = backend or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in get_args(Backend):
        expected = " or ".join(get_args(Backend))
        raise ConfigError(f"{ENVIRONMENT_VARIABLE}: expected {expected}, got {quoted(name)}")
    return cast(Backend, name)


class UsesKernels:
    """A mixin of modules that choose between kernels.

    Attributes:
        kernels: The backend in use.
    """

    kernels: Backend = "auto"

    def use_kernels(self, backend: Backend) -> None:
        """Take the fast paths, or the reference, from the next call on. Modules inside this one are
        not switched; see the function `use_kernels`."""
        self.kernels = backend


def use_kernels(model: nn.Module, backend: Backend) -> None:
    """Switch the kernels of a model and all of its modules, also between two calls of it.

    Args:
        model: the model.
        backend: `auto` uses every fast path that fits; `reference` uses only torch, transformers
            and peft.

    Example:
        ```python
        use_kernels(model, "reference")
        ```
    """
    for module in model.modules():
        if isinstance(module, UsesKernels):
            module.use_kernels(backend)
