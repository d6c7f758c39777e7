"""What is here and what is fast: devices by name, floating-point types (measured on a CPU, known on
a GPU), and copies to a device that nobody waits for."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor

from mmllm.errors import ConfigError, quoted


def named_dtype(name: torch.dtype | str) -> torch.dtype:
    """float32, bfloat16 or float16, by name or itself; raises ConfigError for another one."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(name).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"dtype: expected {', '.join(known)}, got {name!r}")
    return known[name]


@functools.cache
def fast_dtype(kind: str) -> torch.dtype:
    """bfloat16 where its products are clearly faster than float32's on a kind of device (cpu, cuda,
    …), else float32. CUDA before Ampere has it only in emulation."""
    if kind == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has else torch.float32
    if kind == "mps":
        return torch.float32
    speed = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if speed[torch.bfloat16] < speed[torch.float32] / 1.3 else torch.float32


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, without waiting for what the device has still to do: CUDA copies it
    from pinned memory, because what lies in pageable memory may have to wait for all that is
    queued. It does wait for copies to the CPU, which may be read at once, and to MPS, which could
    read the memory after it was given to another tensor (PyTorch issue 189690)."""
    kind = torch.device(device).type
    if kind == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=kind not in ("cpu", "mps"))


def best_device() -> str:
    """cuda, mps or cpu: the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def named_device(name: torch.device | str) -> str:
    """The name of a device that is here (cpu, cuda, cuda:1, mps …); raises ConfigError for another
    one, which says what there is."""
    try:
        device = torch.device(name)
        if (device.index or 0) < _count(device.type):
            return str(device)
    except (RuntimeError, TypeError, ValueError):  # no name of a device
        pass
    raise ConfigError(
        f"device: expected one that is here ({', '.join(_here())}), got {quoted(name)}"
        f"{_remedy(str(name))}"
    )


def _product_seconds(dtype: torch.dtype) -> float:
    """Median of five products of [512, 1024] and [1024, 1024]."""
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - began)
    return sorted(times)[2]


def _count(kind: str) -> int:
    """How many devices of a kind are here."""
    if kind == "cpu":
        return 1
    backend: Any = getattr(torch, kind, None)
    if not hasattr(backend, "is_available") or not backend.is_available():
        return 0
    return backend.device_count()


def _here() -> list[str]:
    kinds = {"cpu", "cuda", "mps"}
    accelerator = torch.accelerator.current_accelerator()
    kinds |= {accelerator.type} if accelerator else set()
    found = {kind: _count(kind) for kind in sorted(kinds)}
    return [
        kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        for kind, count in found.items()
        if count
    ]


def _remedy(name: str) -> str:
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"; this PyTorch ({torch.__version__}) was built without CUDA"
        return "; PyTorch finds no GPU that it can use: does `nvidia-smi` list one?"
    if kind not in ("cpu", "cuda", "mps"):
        return "; an NVIDIA or AMD GPU is called cuda, Apple's mps"
    return ""
