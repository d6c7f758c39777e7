"""Devices by name, floating-point types (their speed measured on a CPU, known on a GPU), and copies
to a device that do not block."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor

from mmllm.errors import ConfigError, quoted


def parse_dtype(name: torch.dtype | str) -> torch.dtype:
    """Return float32, bfloat16 or float16, given its name or itself.

    Raises:
        ConfigError: For any other dtype.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(name).removeprefix("torch.")
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


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy the tensor to `device` without waiting for the work that is queued there.

    CUDA copies from pinned memory, because a copy from pageable memory may wait for the queue.
    Copies to the CPU do wait, as the result may be read at once, and so do copies to MPS, which
    could read the memory after it was reused for another tensor (PyTorch issue 189690).
    """
    device_type = torch.device(device).type
    if device_type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device_type not in ("cpu", "mps"))


def best_device() -> str:
    """Return the first of cuda, mps and cpu that is available."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def parse_device(name: torch.device | str) -> str:
    """Return the name of an available device (cpu, cuda, cuda:1, mps …).

    Raises:
        ConfigError: For any other name; the message lists the available devices.
    """
    try:
        device = torch.device(name)
        if (device.index or 0) < device_count(device.type):
            return str(device)
    except (RuntimeError, TypeError, ValueError):  # not the name of a device
        pass
    raise ConfigError(
        f"device: expected one that is here ({', '.join(_available_devices())}), got "
        f"{quoted(name)}{_remedy(str(name))}"
    )


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Measure the product of [512, 1024] and [1024, 1024]: the median of five."""
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[2]


def device_count(device_type: str) -> int:
    """Count the devices of a type (cpu, cuda, …) that are available."""
    if device_type == "cpu":
        return 1
    backend: Any = getattr(torch, device_type, None)
    if not hasattr(backend, "is_available") or not backend.is_available():
        return 0
    return backend.device_count()


def _available_devices() -> list[str]:
    types = {"cpu", "cuda", "mps"}
    accelerator = torch.accelerator.current_accelerator()
    types |= {accelerator.type} if accelerator else set()
    counts = {device_type: device_count(device_type) for device_type in sorted(types)}
    return [
        device_type if count == 1 else f"{device_type}:0 to {device_type}:{count - 1}"
        for device_type, count in counts.items()
        if count
    ]


def _remedy(name: str) -> str:
    """Return the end of an error message: what may be wrong with this name of a device."""
    device_type = name.partition(":")[0]
    if device_type == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"; this PyTorch ({torch.__version__}) was built without CUDA"
        return "; PyTorch finds no GPU that it can use: does `nvidia-smi` list one?"
    if device_type not in ("cpu", "cuda", "mps"):
        return "; an NVIDIA or AMD GPU is called cuda, Apple's mps"
    return ""
