"""Floating-point types by name, and the fast one of a device (measured on a CPU)."""

from __future__ import annotations

import functools
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from mmllm.errors import ConfigError


def parse_dtype(name: torch.dtype | str) -> torch.dtype:
    """Return float32, bfloat16 or float16, given its name, its short name or itself.

    Raises:
        ConfigError: For any other dtype.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    short = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16"}
    name = str(name).removeprefix("torch.")
    name = short.get(name, name)
    if name not in dtypes:
        raise ConfigError(f"dtype: expected {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


@functools.cache
def fast_dtype(device_type: str) -> torch.dtype:
    """Return bfloat16 where its matrix products are clearly faster than float32's on this type of
    device (cpu, cuda, …), else float32. CUDA before Ampere only emulates bfloat16."""
    if device_type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_native else torch.float32
    if device_type == "mps":
        return torch.float32
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    is_faster = seconds[torch.bfloat16] < seconds[torch.float32] / 1.3
    return torch.bfloat16 if is_faster else torch.float32


def fast_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return autocast to `fast_dtype`; a context that does nothing where that is float32."""
    dtype = fast_dtype(device_type)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Measure the product of [128, 1024] and [1024, 1024]: the median of five."""
    left, right = torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[2]
