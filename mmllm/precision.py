"""What is fast here: the floating-point type (measured on a CPU, known on a GPU), and copies to a
device that nobody waits for."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

from mmllm.errors import ConfigError


def named_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 by name; raises ConfigError for another one."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"dtype: expected {', '.join(known)}, got {name!r}")
    return known[name]


@functools.cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where its products are clearly faster here than float32's, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if torch.backends.mps.is_available():
        return torch.float32
    speed = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if speed[torch.bfloat16] < speed[torch.float32] / 1.3 else torch.float32


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, without waiting for what the device has still to do. CUDA copies what
    lies in pageable memory aside first, so that it may be freed or changed at once; MPS does not
    promise that a copy which nobody waits for is right."""
    return tensor.to(device, non_blocking=torch.device(device).type != "mps")


def best_device() -> str:
    """cuda, mps or cpu: the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _product_seconds(dtype: torch.dtype) -> float:
    """Median of five products of [512, 1024] and [1024, 1024]."""
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - began)
    return sorted(times)[2]
