"""The one thread that answers. Requests wait in a bounded line; those that fit together share a
batch, and a streamed one has the engine to itself."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from mmllm import media
from mmllm.chat import Chat
from mmllm.conversation import Conversation
from mmllm.decoders.base import Cancelled
from mmllm.generation import Choice
from mmllm.replies import Done, Event, Reply
from mmllm.server.errors import ApiError
from mmllm.server.metrics import Metrics
from mmllm.server.settings import Settings


@dataclass(frozen=True)
class Options:
    """The arguments of `Chat.reply` that a batch must agree on."""

    modalities: Mapping[str, Choice] = field(default_factory=dict)
    decoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for options that give the same replies; the order of forced media counts."""
        return json.dumps([self.modalities, self.decoders, self.sampling])

    def keywords(self) -> dict[str, Any]:
        return {"modalities": self.modalities, "decoders": self.decoders, **self.sampling}


@dataclass(eq=False)
class Job:
    """One conversation to be answered. `on_event` streams it: called by the engine's thread."""

    conversation: Conversation
    options: Options
    seed: int
    on_event: Callable[[Event], None] | None = None
    reply: Future[Reply] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Answers jobs with one Chat, from `start` to `close`."""

    def __init__(self, chat: Chat, settings: Settings, metrics: Metrics):
        self.chat = chat
        self.settings = settings
        self.metrics = metrics
        metrics.watch(lambda: len(self._line))
        self._line: deque[Job] = deque()
        self._batch: list[Job] = []
        self._stop_batch = threading.Event()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="mmllm-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    def submit(self, *jobs: Job) -> None:
        """Put jobs in the line, all or none. Raises ApiError (429) when it is full."""
        with self._changed:
            if not self.alive:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            if len(self._line) + len(jobs) > self.settings.waiting:
                raise ApiError(
                    429,
                    f"{len(self._line)} requests wait already; try again soon",
                    code="queue_full",
                )
            self._line.extend(jobs)
            self._changed.notify()

    def cancel(self, *jobs: Job) -> None:
        """Nobody waits for these any more. A batch ends when nobody waits for any of it."""
        with self._changed:
            for job in jobs:
                answered = job.reply.done() and not job.reply.cancelled()
                if answered or job.cancelled.is_set():
                    continue
                self.metrics.cancelled.inc()
                job.cancelled.set()
                job.reply.cancel()  # does nothing to one that is being answered
                if job in self._line:
                    self._line.remove(job)
            if self._batch and all(job.cancelled.is_set() for job in self._batch):
                self._stop_batch.set()

    def close(self) -> None:
        """Drop what waits, stop what runs, and wait for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.cancel(*self._line, *self._batch)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            with media.limits(self.settings.given):
                self._answer(batch)

    def _next(self) -> list[Job]:
        """Wait for a job and gather those that fit to it; nothing at the end."""
        with self._changed:
            batch: list[Job] = []
            while not batch:
                self._changed.wait_for(lambda: self._line or self._closing)
                if self._closing:
                    return []
                batch = self._take(lambda job: True, 1)
            first, until = batch[0], monotonic() + self.settings.gather_seconds
            while first.on_event is None and not self._closing:
                batch += self._take(
                    lambda job: job.on_event is None and job.options.key == first.options.key,
                    self.settings.batch - len(batch),
                )
                left = until - monotonic()
                if len(batch) >= self.settings.batch or left <= 0:
                    break
                self._changed.wait(left)
            self._batch = batch
            self._stop_batch.clear()
            if all(job.cancelled.is_set() for job in batch):
                self._stop_batch.set()
            return batch

    def _take(self, fits: Callable[[Job], bool], most: int) -> list[Job]:
        """Up to `most` jobs out of the line, in its order, that are still waited for."""
        taken = [job for job in self._line if fits(job)][:most]
        for job in taken:
            self._line.remove(job)
        return [job for job in taken if job.reply.set_running_or_notify_cancel()]

    def _answer(self, batch: list[Job]) -> None:
        """Fill in the replies of jobs, or their errors."""
        try:
            if all(job.cancelled.is_set() for job in batch):
                raise Cancelled
            replies = self._stream(batch[0]) if batch[0].on_event else self._together(batch)
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, Cancelled):
                for job in batch:  # what is wrong with one is no fault of the others
                    self._answer([job])
            else:
                for job in batch:
                    job.reply.set_exception(error)
            return
        self.metrics.batches.observe(len(batch))
        for job, reply in zip(batch, replies, strict=True):
            self.metrics.count(reply)
            job.reply.set_result(reply)

    def _together(self, batch: list[Job]) -> list[Reply]:
        return self.chat.reply_many(
            [job.conversation for job in batch],
            seeds=[job.seed for job in batch],
            cancel=self._stop_batch,
            **batch[0].options.keywords(),
        )

    def _stream(self, job: Job) -> list[Reply]:
        events = self.chat.stream(
            job.conversation, seed=job.seed, cancel=job.cancelled, **job.options.keywords()
        )
        assert job.on_event
        for event in events:
            if isinstance(event, Done):
                return [event.reply]
            job.on_event(event)
        raise Cancelled
