"""What a process that trains on a CPU asks of its C library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import torch
from mmllm.kernels import allocator

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

if sys.argv[1] == "kept":
    allocator.keep_freed_memory()
# The first round makes the C library raise its own limit, as the first steps do.
for _ in range(2):
    block = torch.empty(60 << 20, dtype=torch.uint8).fill_(1)
    held = resident()
    del block
print(held - resident())
"""
_OF_MALLOC = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_")
"""How an environment brings another allocator, or other settings of this one."""


def given_back(how: str) -> int:
    """Bytes that the process gives back to the system when it frees a block of 60 MB."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_OF_MALLOC)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return int(run.stdout) * os.sysconf("SC_PAGE_SIZE")


def test_large_blocks_are_kept() -> None:
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError):
        library = ""
    if not library.startswith("glibc") or not Path("/proc/self/statm").is_file():
        pytest.skip("the C library is not glibc, whose allocator this is about")
    assert given_back("kept") < 6 << 20
    assert given_back("as it is") > 54 << 20, "glibc keeps them: keep_freed_memory can go"
