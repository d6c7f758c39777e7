"""Scalars that are copied from the device asynchronously and read later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class DeferredScalars:
    """Scalars whose copy to the host is awaited only when they are read."""

    def __init__(self, compute: Callable[[], Tensor], *, on_gpu: bool):
        """`compute` returns float[N]. On a GPU it is called now and its copy to the host is queued,
        while the device goes on with the next step."""
        self._compute, self._copied = compute, None
        if on_gpu:
            values = compute()
            host = torch.empty_like(values, device="cpu", pin_memory=True)
            host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()
            self._compute = lambda: host

    def read(self) -> list[float]:
        """Wait for the copy and return the scalars."""
        if self._copied:
            self._copied.synchronize()
        return self._compute().tolist()


class StepLosses:
    """The mean losses of a step by name, on their way from the device."""

    def __init__(
        self, names: Sequence[str], weights: Mapping[str, float], numbers: DeferredScalars
    ):
        """
        Args:
            names: of the losses, in the order of their numbers.
            weights: weight of each loss by name.
            numbers: the sums, the numbers of targets, and 1 if the gradient was finite.
        """
        self._names, self._weights, self._numbers = names, weights, numbers

    def __call__(self) -> dict[str, float]:
        """Wait for the step to end. `loss` is the weighted sum of all losses; it is NaN for a step
        whose update was left out."""
        numbers = self._numbers.read()
        parts = zip(self._names, numbers, numbers[len(self._names) :], strict=False)
        values = {name: total / count for name, total, count in parts if count}
        loss = sum(self._weights[name] * values[name] for name in values)
        return {**values, "loss": loss if numbers[-1] else math.nan}


def async_all_reduce(accelerator: Accelerator, values: Tensor) -> Callable[[], Tensor]:
    """Start summing a tensor over all processes.

    Args:
        accelerator: the run's accelerator.
        values: overwritten with the sums.

    Returns:
        A function that waits for the sums and returns them.
    """
    if not accelerator.use_distributed:
        return lambda: values
    work: Any = torch.distributed.all_reduce(values, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return values

    return wait
