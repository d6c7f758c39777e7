"""What a process that trains on a CPU asks of its libraries."""

from __future__ import annotations

import ctypes
import os

_FEW_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
"""oneDNN keeps what it has made for the last 1,024 shapes. Each step's packed rows have shapes of
their own, so most of that is never used again; these hold a step's several times over."""
_KEPT = 256 << 20
"""Bytes of a block up to which glibc keeps what is freed for whoever asks next. By itself it gives
large blocks back to the system, which clears their pages again for every step."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_… of malloc.h


def settle() -> None:
    """Set both, where the process has these libraries; the first only for what runs after it."""
    os.environ.setdefault(*_FEW_KERNELS)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_THRESHOLD, _KEPT)
