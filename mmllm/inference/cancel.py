"""Cancelling a request, from any thread."""

from __future__ import annotations

import threading

from mmllm.decoders.contract import Cancelled


class CancelToken:
    """Whether one request is cancelled: by its own `cancel`, or by an event of the caller's.

    Example:
        >>> token = CancelToken()
        >>> token.cancel()
        >>> token.is_cancelled
        True
    """

    def __init__(self, event: threading.Event | None = None):
        """`event`: cancels the request when it is set."""
        self._own = threading.Event()
        self._event = event

    @property
    def is_cancelled(self) -> bool:
        """Whether the request is cancelled, by this token or by the caller's event."""
        return self._own.is_set() or (self._event is not None and self._event.is_set())

    def cancel(self) -> None:
        """End the work soon; the caller's event stays as it is."""
        self._own.set()

    def check(self) -> None:
        """Raise Cancelled if the request is cancelled."""
        if self.is_cancelled:
            raise Cancelled
