"""Cooperative scheduling: several threads wait for shared work, and one of them does it.

There is no background thread. Of the threads that wait, the first one that finds no other at work
computes one unit (one step of the batch, one batch of media) for all; then each checks whether its
own result is ready, and another one continues:

    thread A   wait -> work ---------> done, leaves
    thread B   wait ......... (notified) work -> work ----> done, leaves
    thread C   wait ......... (notified) ..................(notified) work -> done

This is flat combining (Hendler et al. 2010) with a unit of work that serves all requests at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_POLL_INTERVAL = 0.05
"""Seconds between two looks at what may end a wait."""


class CooperativeScheduler:
    """Work that several threads wait for, and one of them does.

    Attributes:
        changed: the condition that guards the shared state, notified after each unit of work.
        is_busy: whether a thread is at work.
        num_waiting: threads that wait, the one at work included.
    """

    def __init__(self, work: Callable[[], None]):
        """`work`: does one unit, without the lock."""
        self.changed = threading.Condition(threading.Lock())
        self.is_busy = False
        self.num_waiting = 0
        self._work = work

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Work, or wait for the thread at work, until `is_done()`, which is called with the lock
        held, after each unit of work and at least every 50 ms; it may raise to leave."""
        with self.changed:
            self.num_waiting += 1
            try:
                while not is_done():
                    self._work_or_wait()
            finally:
                self.num_waiting -= 1

    def _work_or_wait(self) -> None:
        if self.is_busy:
            self.changed.wait(_POLL_INTERVAL)
            return
        self.is_busy = True
        self.changed.release()
        try:
            self._work()
        finally:
            self.changed.acquire()
            self.is_busy = False
            self.changed.notify_all()
