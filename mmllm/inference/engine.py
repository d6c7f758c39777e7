"""One engine for all who ask one model: their rows share the steps of the LLM, and their media the
batches of the decoders.

It has no thread of its own. Of those who wait, one works for all: it takes the next step of all
rows, or makes the next batch of media, until what it waits for itself is done; then another goes
on. Text and each lane of decoders have a worker each, so that none holds another up: on a CPU every
decoder is a lane, while those on one accelerator, whose queue and memory are one, take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmllm.conversation import Medium
from mmllm.decoders.contract import Cancelled
from mmllm.inference.batching import ContinuousBatcher
from mmllm.inference.prefill import Prefill
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.scheduler import CooperativeScheduler
from mmllm.model import AnyToAny

_GATHER = 0.01
"""Seconds that media wait for those of others, whose text may have ended with the same step."""


@dataclass(eq=False)
class MediaRequest:
    """M media that one call wants of one decoder: the states of their runs float[M, K, D], a
    generator each, what they start from (None: noise alone), and what else `sample` is called
    with. `on_step` may raise, which ends this order; `on_preview` is called with M pictures. Two
    orders of one `owner` are never made in one batch: what a call gets while nobody else asks does
    not depend on how fast it is."""

    key: str
    states: Tensor
    generators: Sequence[torch.Generator]
    sources: Sequence[Medium] | None
    options: Mapping[str, Any]
    owner: object
    on_step: Callable[[int, int], None]
    on_preview: Callable[[list[Medium]], None] | None = None
    made: list[Medium] | None = None
    error: BaseException | None = None

    def fits(self, other: MediaRequest) -> bool:
        """Whether both can be made in one batch."""
        return (self.key, self.sources is None, self.options) == (
            other.key,
            other.sources is None,
            other.options,
        )


class Engine:
    """Generates rows and makes media, for any number of threads at once."""

    def __init__(self, model: AnyToAny, prefix_cache: PrefixCache):
        self.model = model
        self.prefix_cache = prefix_cache
        self._batcher = ContinuousBatcher(model, prefix_cache)
        self._entering: list[Prefill] = []
        self._text = CooperativeScheduler(self._step)
        self._lanes: dict[str, DecoderQueue] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held: no row, no order."""
        return not (self._entering or self._batcher.sequences or self.num_waiting_media)

    @property
    def num_waiting_media(self) -> int:
        """Orders that no decoder has begun with."""
        return sum(len(lane.orders) for lane in list(self._lanes.values()))

    def generate(self, entry: Prefill, poll: Callable[[], None]) -> None:
        """Generate rows to their end. `poll`: called between steps; may raise to leave, and is
        called once more when all is there."""

        def done() -> bool:
            finished = all(row.done for row in entry.sequences)
            poll()
            for row in entry.sequences:
                if row.error:
                    raise row.error
            return finished

        with self._text.changed:
            self._entering.append(entry)
        try:
            self._text.wait(done)
        finally:
            with self._text.changed:
                for row in entry.sequences:
                    row.done = True
                if entry in self._entering:
                    self._entering.remove(entry)
                if not self._text.is_busy:  # else who works now does so
                    self._batcher.remove_done()

    def render_media(self, order: MediaRequest, poll: Callable[[], None]) -> list[Medium]:
        """The media of an order, made with those that fit to it and wait as well. `poll` may raise
        to leave; the others' go on."""

        def done() -> bool:
            poll()
            if order.error:
                raise order.error
            return order.made is not None

        device = self.model.decoders[order.key].device
        name = order.key if device.type == "cpu" else str(device)
        lane = self._lanes.setdefault(name, DecoderQueue(self._sample))
        with lane.changed:
            lane.orders.append(order)
        try:
            lane.wait(done)
        finally:
            with lane.changed:
                if order.made is None:
                    order.error = order.error or Cancelled()
                if order in lane.orders:
                    lane.orders.remove(order)
        assert order.made is not None
        return order.made

    def _step(self) -> None:
        """Let those in who wait, and take a step with all."""
        with self._text.changed:
            entering, self._entering = self._entering, []
        rows = [row for entry in entering for row in entry.sequences]
        try:
            for entry in entering:
                self._enter(entry)
            self._batcher.step()
        except BaseException as error:  # the step was that of all
            for row in [*self._batcher.sequences, *rows]:
                row.error, row.done = error, True
            self._batcher.clear()
            if not isinstance(error, Exception):
                raise

    def _enter(self, entry: Prefill) -> None:
        """Read prompts; what is wrong with them is no fault of the others."""
        if all(row.done for row in entry.sequences):
            return
        try:
            self._batcher.join(entry)
        except Exception as error:
            for row in entry.sequences:
                row.error, row.done = error, True

    def _sample(self, lane: DecoderQueue) -> None:
        """Make the media of the order that has waited longest and of those that fit to it."""
        if max(self._text.num_waiting, lane.num_waiting) > 1:
            time.sleep(_GATHER)
        batch = lane.next()
        first = batch[0]
        counts = [len(order.states) for order in batch]

        def on_step(step: int, steps: int) -> None:
            for order in batch:
                if not order.error:
                    try:
                        order.on_step(step, steps)
                    except Exception as error:
                        order.error = error
            if all(order.error for order in batch):
                raise Cancelled

        def on_preview(pictures: list[Medium]) -> None:
            for order, shown in zip(batch, _parts(pictures, counts), strict=True):
                if order.on_preview:
                    order.on_preview(shown)

        try:
            states = torch.cat([order.states for order in batch])
            media = self.model.decoders[first.key].sample(
                self.model.condition({first.key: states})[first.key],
                generators=[generator for order in batch for generator in order.generators],
                init_media=None
                if first.sources is None
                else [source for order in batch for source in order.sources or ()],
                on_step=on_step,
                on_preview=on_preview if any(order.on_preview for order in batch) else None,
                options=first.options,
            )
        except BaseException as error:
            for order in batch:
                order.error = order.error or error
            if not isinstance(error, Exception):
                raise
        else:
            for order, made in zip(batch, _parts(media, counts), strict=True):
                order.made = made


class DecoderQueue(CooperativeScheduler):
    """The orders that wait for decoders of which one works at a time."""

    def __init__(self, sample: Callable[[DecoderQueue], None]):
        super().__init__(lambda: sample(self))
        self.orders: list[MediaRequest] = []

    def next(self) -> list[MediaRequest]:
        """Take the order that has waited longest and those that fit to it."""
        with self.changed:
            first = self.orders[0]
            fitting = {
                id(order.owner): order for order in reversed(self.orders) if order.fits(first)
            }
            batch = list(fitting.values())
            self.orders = [order for order in self.orders if order not in batch]
        return batch


def _parts(media: Sequence[Medium], counts: Sequence[int]) -> list[list[Medium]]:
    """Consecutive parts of these lengths."""
    rest = iter(media)
    return [[next(rest) for _ in range(count)] for count in counts]
