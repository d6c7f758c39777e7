"""Worker threads that answer requests from a bounded queue.

Requests that run at the same time share the chat's engine (mmllm.inference.engine), streamed or
not, whatever their options.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mmllm import media
from mmllm.conversation import Conversation
from mmllm.decoders.contract import Cancelled
from mmllm.inference.chat import Chat
from mmllm.inference.events import Done, Event
from mmllm.inference.options import ModalityChoice
from mmllm.inference.replies import Reply
from mmllm.server.errors import ApiError
from mmllm.server.metrics import Metrics
from mmllm.server.settings import ServerSettings


@dataclass(frozen=True)
class ReplyOptions:
    """The keyword arguments of `Chat.reply` other than the conversation, and the budget of each of
    its media."""

    modalities: Mapping[str, ModalityChoice] = field(default_factory=dict)
    decoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    media_tokens: int | None = None

    def keywords(self) -> dict[str, Any]:
        return {"modalities": self.modalities, "decoders": self.decoders, **self.sampling}


@dataclass(eq=False)
class ReplyJob:
    """One conversation to be answered `num` times, with consecutive seeds from `seed`.

    `on_event` receives the events of a streamed reply, in the worker thread.
    """

    conversation: Conversation
    options: ReplyOptions
    seed: int
    num: int = 1
    on_event: Callable[[Event], None] | None = None
    replies: Future[list[Reply]] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)


class Dispatcher:
    """Worker threads that answer queued jobs with one Chat, `settings.max_batch` at a time."""

    def __init__(self, chat: Chat, settings: ServerSettings, metrics: Metrics):
        self.chat = chat
        self.settings = settings
        self.metrics = metrics
        metrics.watch(lambda: len(self._line), lambda: len(self._running))
        self._line: deque[ReplyJob] = deque()
        self._running: list[ReplyJob] = []
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"mmllm-{number}", daemon=True)
            for number in range(settings.max_batch)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return not self._closing and all(thread.is_alive() for thread in self._threads)

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    def submit(self, job: ReplyJob) -> None:
        """Put a job in the queue. Raises ApiError (429) when it is full."""
        with self._changed:
            if not self.alive:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            if len(self._line) >= self.settings.max_queued:
                raise ApiError(
                    429,
                    f"{len(self._line)} requests wait already; try again soon",
                    code="queue_full",
                )
            self._line.append(job)
            self._changed.notify()

    def cancel(self, *jobs: ReplyJob) -> None:
        """Drop the queued jobs among these and cancel the running ones: their clients are gone."""
        with self._changed:
            for job in jobs:
                answered = job.replies.done() and not job.replies.cancelled()
                if answered or job.cancelled.is_set():
                    continue
                self.metrics.cancelled.inc()
                job.cancelled.set()
                job.replies.cancel()  # does nothing to one that is being answered
                if job in self._line:
                    self._line.remove(job)

    def close(self) -> None:
        """Drop queued jobs, stop running ones, and join the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.cancel(*self._line, *self._running)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._finish(job)
            del job  # and with it its media, which are large, until the next one comes

    def _finish(self, job: ReplyJob) -> None:
        try:
            with media.limits(self.settings.input_limits):
                replies = self._answer(job)
        except Exception as error:
            self._done(job)
            job.replies.set_exception(error)
        else:
            self._done(job)
            for reply in replies:
                self.metrics.count(reply)
            job.replies.set_result(replies)

    def _next(self) -> ReplyJob | None:
        """Wait for a job whose client is still there; None when the dispatcher is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._line or self._closing)
                if self._closing:
                    return None
                job = self._line.popleft()
                if job.replies.set_running_or_notify_cancel():
                    self._running.append(job)
                    return job

    def _done(self, job: ReplyJob) -> None:
        with self._changed:
            self._running.remove(job)

    def _answer(self, job: ReplyJob) -> list[Reply]:
        if job.on_event is None:
            return self.chat.reply_many(
                [job.conversation] * job.num,
                seeds=[job.seed + number for number in range(job.num)],
                cancel=job.cancelled,
                **job.options.keywords(),
            )
        events = self.chat.stream(
            job.conversation, seed=job.seed, cancel=job.cancelled, **job.options.keywords()
        )
        for event in events:
            if isinstance(event, Done):
                return [event.reply]
            job.on_event(event)
        raise Cancelled
