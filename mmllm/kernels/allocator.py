"""Settings of glibc's malloc and of oneDNN for a process, by what the process does.

Both policies hold for the whole process from then on, and the one that is set last holds: a process
either trains or serves. Neither has an effect on other C libraries.

- Training repeats steps of like sizes in few threads: `keep_freed_memory` spares the system calls
  (and the clearing of pages) that returning and taking large blocks in every step costs.
- Serving has many threads that come and go, and requests of unlike sizes: `limit_malloc_arenas`
  returns memory, which else accumulates in the heaps of threads.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of glibc's malloc.h."""
_ONEDNN_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
"""oneDNN caches the primitives of the last 1,024 shapes. Each training step's packs have shapes of
their own, so that most are never used again; 128 hold those of a step several times over."""


def keep_freed_memory() -> None:
    """Set the policy for training: freed blocks up to 256 MB are kept for the next allocation, and
    oneDNN's cache of primitives is limited (it reads its setting at the first product of the
    process)."""
    os.environ.setdefault(*_ONEDNN_CACHE)
    _mallopt({_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 256 << 20})


def limit_malloc_arenas() -> None:
    """Set the policy for serving: all threads share two arenas, and blocks from 1 MB on are
    returned to the system at once. Call it before a model is loaded.

    By default there are up to eight arenas a core, and each keeps what its threads once needed: the
    private memory of `mmllm serve mini` grew from 1.0 to 1.3 GB over 250 mixed requests
    (`python benchmarks/serving.py memory`).
    """
    _mallopt({_ARENA_MAX: 2, _MMAP_THRESHOLD: 1 << 20})


def _mallopt(settings: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for parameter, value in settings.items():
        mallopt(parameter, value)
