"""Devices by name, and copies to a device that do not block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmllm.errors import ConfigError, quoted


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device without waiting for the work that is queued there.

    CUDA copies from pinned memory, because a copy from pageable memory may wait for the queue.
    Copies to the CPU do wait, as the result may be read at once, and so do copies to MPS, which
    could read the memory after it was reused for another tensor (PyTorch issue 189690).

    Args:
        tensor: the tensor; one that is on the device already is returned.
        device: the device.
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
