"""What a training process asks of its C library."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, sys
import torch
from mmllm.training import cpu
if sys.argv[1] == "settled":
    cpu.settle()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.empty(60 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(4)][-1])
"""


def faults(how: str) -> int:
    """Pages that the system hands out for three blocks of 60 MB, one after the other, when there
    were nine before."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_large_blocks_are_used_again() -> None:
    assert faults("settled") < 1000
    assert faults("as it is") > 10_000, "the C library does so by itself, and settle can go"
