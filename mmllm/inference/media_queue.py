"""Media of replies: requests for them, the queues of the decoders, and the threads that wait.

    ReplyRequest --submit(MediaRequest)--> MediaThreads --render--> DecoderQueue --> decoder.sample
                 <--------Future[RenderedMedia]---------

Requests of different calls that fit one another are rendered in one batch.

Legend: M media, K signal tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mmllm.conversation import Medium
from mmllm.decoders.contract import Cancelled, Condition
from mmllm.inference.cancel import CancelToken
from mmllm.inference.conditions import blend
from mmllm.inference.editing import EditSources, together
from mmllm.inference.events import EventSink, Progress
from mmllm.inference.scheduler import CooperativeScheduler
from mmllm.model import AnyToAny


@dataclass(eq=False)
class MediaRequest:
    """M media that one call wants of one decoder.

    Attributes:
        key: the decoder's output key.
        modality: the decoder's modality.
        states: hidden states of their words and signal spans, float[M, W + K, D].
        captions: what each is to show, for output projections that read captions.
        generators: one for each.
        sources: what each is made from besides its states, all of one kind.
        options: what else `decoder.sample` is called with.
        owner: the call. Two requests of one owner are never rendered in one batch: what a call gets
            while there is no other one does not depend on how fast it is.
        places: (conversation, part of the message) of each, for the events.
        sink: takes Progress.
        cancel: ends the request.
        previews: whether Progress carries previews.
        media: the result.
        condition: under which they were made, M rows.
        error: why there is none.
    """

    key: str
    modality: str
    states: Tensor
    captions: Sequence[str]
    generators: Sequence[torch.Generator]
    sources: Sequence[EditSources]
    options: Mapping[str, Any]
    owner: object
    places: Sequence[tuple[int, int]]
    sink: EventSink
    cancel: CancelToken
    previews: bool = False
    media: list[Medium] | None = None
    condition: Condition = field(default_factory=dict[str, Tensor])
    error: BaseException | None = None
    _previews: list[Any] = field(default_factory=list)

    def fits(self, other: MediaRequest) -> bool:
        """Whether both can be rendered in one batch."""
        return (self.key, self.sources[0].kind, self.options) == (
            other.key,
            other.sources[0].kind,
            other.options,
        )

    def show(self, images: list[Medium]) -> None:
        """Take M previews, for the next Progress."""
        self._previews = list(images)

    def report(self, step: int, steps: int) -> None:
        """Emit the Progress of each medium of the request.

        Args:
            step: denoising steps done.
            steps: the number of steps.

        Raises:
            Cancelled: the caller has cancelled; what the sink raises is passed on too.
        """
        self.cancel.check()
        previews = self._previews or [None] * len(self.places)
        self._previews = []
        for index, (conversation, part_index) in enumerate(self.places):
            self.sink(
                conversation,
                Progress(part_index, self.modality, step, steps, previews[index], index),
            )


@dataclass(frozen=True)
class RenderedMedia:
    """The media of one request, the seconds that they took, waiting included, and their conditions,
    M rows."""

    media: list[Medium]
    seconds: float
    condition: Condition


class DecoderQueue(CooperativeScheduler):
    """The requests that wait for decoders of which one works at a time."""

    def __init__(self, model: AnyToAny, gather: Callable[[DecoderQueue], None]):
        """`gather`: called before a batch is taken, to let other requests come."""
        super().__init__(self._render_next)
        self.model = model
        self.requests: list[MediaRequest] = []
        self._gather = gather

    def render(self, request: MediaRequest) -> list[Medium]:
        """Wait for the media of a request, which are rendered with those that fit and wait as well.

        Raises:
            Cancelled: soon after the request is cancelled; the batch goes on for the others.
        """

        def is_done() -> bool:
            request.cancel.check()
            if request.error:
                raise request.error
            return request.media is not None

        with self.changed:
            self.requests.append(request)
        try:
            self.wait(is_done)
        finally:
            with self.changed:
                if request.media is None:
                    request.error = request.error or Cancelled()
                if request in self.requests:
                    self.requests.remove(request)
        assert request.media is not None
        return request.media

    def take(self) -> list[MediaRequest]:
        """Remove and return the request that has waited longest and those that fit to it."""
        with self.changed:
            first = self.requests[0]
            fitting = {
                id(request.owner): request
                for request in reversed(self.requests)
                if request.fits(first)
            }
            batch = list(fitting.values())
            self.requests = [request for request in self.requests if request not in batch]
        return batch

    def _render_next(self) -> None:
        self._gather(self)
        batch = self.take()
        try:
            media, condition = self._sample(batch)
        except BaseException as error:
            for request in batch:
                request.error = request.error or error
            if not isinstance(error, Exception):
                raise
        else:
            begin = 0
            for request, rendered in zip(batch, _split_by(batch, media), strict=True):
                rows = slice(begin, begin + len(rendered))
                request.condition = {name: value[rows] for name, value in condition.items()}
                request.media, begin = rendered, rows.stop

    def _sample(self, batch: Sequence[MediaRequest]) -> tuple[list[Medium], Condition]:
        """The media of all requests, from one call of the decoder, and their conditions."""
        first = batch[0]

        def on_step(step: int, steps: int) -> None:
            for request in batch:
                if not request.error:
                    try:
                        request.report(step, steps)
                    except Exception as error:
                        request.error = error
            if all(request.error for request in batch):
                raise Cancelled

        def on_preview(images: list[Medium]) -> None:
            for request, shown in zip(batch, _split_by(batch, images), strict=True):
                if request.previews:
                    request.show(shown)

        states = torch.cat([request.states for request in batch])
        projection = self.model.output_projection(first.key)
        decoder, captions = self.model.decoders[first.key], {}
        if projection.reads_captions:
            captions = decoder.encode_captions([c for each in batch for c in each.captions])
        sources = [source for request in batch for source in request.sources]
        media = together(sources)
        condition = blend(
            self.model.condition({first.key: states}, {first.key: captions})[first.key],
            [(source.condition, source.keep) for source in sources],
        )
        made = decoder.sample(
            condition,
            generators=[generator for request in batch for generator in request.generators],
            init_media=media.init,
            masks=media.masks,
            references=media.references,
            on_step=on_step,
            on_preview=on_preview if any(request.previews for request in batch) else None,
            options=first.options,
            negative=projection.null_condition(len(states)),
        )
        return made, condition


class MediaThreads:
    """Threads in which one call waits for its media, one for each decoder, so that its text goes on
    meanwhile; media of one decoder are rendered in the order of their submission.

    A context manager: on exit all threads have ended.
    """

    def __init__(self, render: Callable[[MediaRequest], list[Medium]], keys: Collection[str]):
        self._render = render
        self._keys = keys
        self._exit_stack = ExitStack()
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def __enter__(self) -> Self:
        for key in self._keys:  # threads start with the first submission
            self._threads[key] = self._exit_stack.enter_context(ThreadPoolExecutor(1))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit_stack.__exit__(kind, error, trace)

    def submit(self, request: MediaRequest) -> Future[RenderedMedia]:
        """Begin to render a request."""
        return self._threads[request.key].submit(self._wait, request)

    @torch.inference_mode()
    def _wait(self, request: MediaRequest) -> RenderedMedia:
        began = time.perf_counter()
        request.cancel.check()
        media = self._render(request)
        return RenderedMedia(media, time.perf_counter() - began, request.condition)


def _split_by(batch: Sequence[MediaRequest], media: Sequence[Medium]) -> list[list[Medium]]:
    """The media of a batch, request by request."""
    rest = iter(media)
    return [[next(rest) for _ in request.places] for request in batch]
