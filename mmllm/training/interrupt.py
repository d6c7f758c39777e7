"""Ctrl-C and SIGTERM end training after the current step, on every process at the same step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from mmllm.kernels.devices import to_device
from mmllm.training.deferred import DeferredScalars, async_all_reduce

logger = logging.getLogger(__name__)


class Interrupt:
    """Context manager that turns Ctrl-C and SIGTERM into a flag; a second signal ends at once.

    A signal that was ignored before stays ignored: shells start background jobs so, which Ctrl-C is
    not meant for. Outside the main thread, where Python installs no handlers, signals do what they
    did before.
    """

    def __init__(self) -> None:
        self.seen = False
        self._flag: DeferredScalars | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for number, handler in self._handlers.items():
            # None: a handler that Python did not install, and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._flag and error is None:  # no reduction may be pending when the group is left
            self._flag.read()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        logger.warning("stopping after this step; once more to stop at once")

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether to stop; the same answer on every process at the same step.

        A single process stops at once. Several stop one step after any of them was interrupted:
        the flags are reduced while that step runs, so that the host waits for nothing.
        """
        if accelerator.num_processes == 1:
            return self.seen
        flag = to_device(torch.tensor([float(self.seen)]), accelerator.device)
        previous = self._flag
        self._flag = DeferredScalars(
            async_all_reduce(accelerator, flag), on_gpu=accelerator.device.type == "cuda"
        )
        return previous is not None and previous.read()[0] > 0
