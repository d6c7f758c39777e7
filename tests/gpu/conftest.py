"""What one GPU does is compared with what the CPU does; at the end stands a report to paste.

The bodies know their device by name alone. On a machine without a GPU they run on the second device
of tests/second_device.py:

    MMLLM_TEST_DEVICE=second pytest tests/gpu
"""

from __future__ import annotations

import os
import platform
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest
import torch

from tests import second_device
from tests.device.training import OnDevice, on_device
from tests.training.conftest import data, make_run

__all__ = ["OnDevice", "data", "make_run", "on_device"]

NAME = os.environ.get("MMLLM_TEST_DEVICE", "cuda")
_PACKAGES = ("torch", "transformers", "diffusers", "peft", "accelerate")
_SYNCHRONISES = "called a synchronizing CUDA operation"
_seconds: dict[str, float] = {}
_outcomes: dict[str, str] = {}
_notes: dict[str, list[str]] = {}


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, which computes as exactly as it can: float32 without TF32."""
    if NAME == second_device.NAME:
        with second_device.inference_as_no_grad():
            yield second_device.DEVICE
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False here")
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    yield torch.device("cuda")
    products.allow_tf32, convolutions.allow_tf32 = before


@pytest.fixture
def waiting(device: torch.device) -> Callable:
    """`with waiting() as counted`: what the host waits for inside it, by name."""
    return second_device.host_waits if device.type == second_device.NAME else _cuda_waits


@contextmanager
def _cuda_waits() -> Iterator[Counter[str]]:
    """torch warns of each operation that waits."""
    counted: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counted
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found = [warning for warning in caught if _SYNCHRONISES in str(warning.message)]
            counted.update(f"{warning.filename}:{warning.lineno}" for warning in found)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`note("3.1 s a reply")`: a line of the report, behind its test."""
    return _notes.setdefault(request.node.name, []).append


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/gpu/" not in report.nodeid:
        return
    name = report.nodeid.rpartition("::")[2]
    _seconds[name] = _seconds.get(name, 0.0) + report.duration
    if report.when == "call" or report.outcome != "passed":
        _outcomes[name] = report.outcome


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The report, unless nothing ran."""
    if not set(_outcomes.values()) - {"skipped"}:
        return
    write = terminalreporter.write_line
    terminalreporter.section("mmllm on a GPU: paste from here")
    for line in _machine():
        write(line)
    for name, outcome in _outcomes.items():
        write(f"{outcome:8} {_seconds[name]:6.1f} s  {name}")
        for note in _notes.get(name, ()):
            write(f"{'':20}{note}")
    write(f"{sum(_seconds.values()):.0f} s in all")
    terminalreporter.section("to here")


def _machine() -> list[str]:
    lines = [f"{platform.platform()}, Python {platform.python_version()}"]
    lines.append(", ".join(f"{name} {version(name)}" for name in _PACKAGES))
    if NAME == "cuda" and torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        lines.append(
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {about.major}."
            f"{about.minor}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
        lines.append(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated at most")
    else:
        lines.append(f"{NAME}: no GPU, only a trial of the tests")
    return lines
