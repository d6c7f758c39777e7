"""Settings of the C library's allocator and of oneDNN for a process that trains on a CPU."""

from __future__ import annotations

import ctypes
import os

_ONEDNN_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
"""oneDNN caches the primitives of the last 1,024 shapes. Each step's packs have shapes of their
own, so that most are never used again; 128 hold those of a step several times over."""
_KEPT_BLOCK_BYTES = 256 << 20
"""Size of a block up to which glibc keeps freed memory for the next allocation. By default it gives
large blocks back to the system, which clears their pages again in every step."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_… of malloc.h


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed blocks, and limit oneDNN's cache of primitives. No effect on
    other C libraries; oneDNN reads its setting at the first product of the process."""
    os.environ.setdefault(*_ONEDNN_CACHE)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)
