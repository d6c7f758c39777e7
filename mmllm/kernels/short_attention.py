"""Attention over short rows, such as those of an output projection."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmllm.kernels.backend import Backend


def short_attention(x: Tensor, backend: Backend) -> AbstractContextManager[object]:
    """Return the context in which torch's attention over short rows runs.

    In training on a CPU plain products are used, whose gradient takes two thirds of the fused
    kernel's time. Not in generation: torch's switch is the whole process's, and the language model
    runs on in another thread meanwhile, whose sums would be rounded in another order.

    Args:
        x: the input, whose device decides.
        backend: `reference` leaves torch's choice.
    """
    is_training = torch.is_grad_enabled() and x.device.type == "cpu"
    prefers_math = backend == "auto" and is_training
    return sdpa_kernel(SDPBackend.MATH) if prefers_math else nullcontext()
