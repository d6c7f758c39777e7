"""Garbage collection."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Collect no cyclic garbage in the block.

    Imports and loading make hundreds of thousands of objects that stay; to look through them again
    and again takes a fifth of the time (benchmarks/first_words.py).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
