"""Iterators over the events of a call that computes in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from mmllm.decoders.contract import Cancelled
from mmllm.inference.cancel import CancelToken
from mmllm.inference.events import Event


def iterate_events(
    work: Callable[[Callable[[Event], None]], None], cancel: CancelToken
) -> Iterator[Event]:
    """Call `work(put)` in a thread, and yield what it puts.

    The thread is needed because a diffusion pipeline cannot be suspended inside its loop and
    continued. The caller's context variables (media.limits) hold in it.

    Args:
        work: ends without an error when it raises Cancelled; other errors are raised here.
        cancel: is cancelled when the iterator is closed, which waits for the thread.
    """
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            work(events.put)
        except Cancelled:
            pass
        except BaseException as error:
            events.put(error)
        finally:
            events.put(None)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        cancel.cancel()
        thread.join()


async def iterate_events_async(
    iterate: Callable[[], Iterable[Event]], cancel: threading.Event
) -> AsyncIterator[Event]:
    """Yield the events of an iterator that runs in a thread.

    Args:
        iterate: makes the iterator, in the thread.
        cancel: set when the generator is closed, so that the thread ends.

    Raises:
        BaseException: what the iterator raises.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()

    def put(event: Event | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for events
            loop.call_soon_threadsafe(events.put_nowait, event)

    def run() -> None:
        try:
            for event in iterate():
                put(event)
        except BaseException as error:
            put(error)
        finally:
            put(None)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), daemon=True).start()
    try:
        while (event := await events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        cancel.set()
