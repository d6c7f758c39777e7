"""The engine: one for each model. Its callers share the steps of the LLM and the decoders' batches.

It has no thread of its own: the threads that wait for a reply take turns at the work
(mmllm.inference.scheduler). Text and each queue of decoders are scheduled by themselves, so that
none holds another up: on a CPU every decoder has a queue, while those on one accelerator, whose
compute and memory are shared, have one together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mmllm.conversation import Medium
from mmllm.inference.batching import ContinuousBatcher
from mmllm.inference.conditions import ConditionMemory
from mmllm.inference.media_queue import DecoderQueue, MediaRequest
from mmllm.inference.prefill import Prefill
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.scheduler import CooperativeScheduler
from mmllm.model import AnyToAny

_GATHER_SECONDS = 0.01
"""How long media wait for those of other callers, whose text may have ended with the same step."""


class Engine:
    """Generates sequences and renders media, for any number of threads at once."""

    def __init__(self, model: AnyToAny, prefix_cache: PrefixCache):
        self.model = model
        self.prefix_cache = prefix_cache
        self.conditions = ConditionMemory()
        self._batcher = ContinuousBatcher(model, prefix_cache)
        self._entering: list[Prefill] = []
        self._text = CooperativeScheduler(self._step)
        self._queues: dict[str, DecoderQueue] = {}

    @property
    def is_idle(self) -> bool:
        """Whether it holds no sequence and no request for media."""
        return not (self._entering or self._batcher.sequences or self.num_waiting_media)

    @property
    def num_waiting_media(self) -> int:
        """Requests for media that no decoder has begun with."""
        return sum(len(queue.requests) for queue in list(self._queues.values()))

    def generate(self, prefills: Sequence[Prefill], poll: Callable[[], bool]) -> None:
        """Generate sequences until `poll` says that they are done.

        Args:
            prefills: the prompts.
            poll: called between steps; returns whether to end, and may raise to leave.
        """
        with self._text.changed:
            self._entering += prefills
        try:
            self._text.wait(poll)
        finally:
            with self._text.changed:
                for prefill in prefills:
                    for sequence in prefill.sequences:
                        sequence.done = True
                self._entering = [entry for entry in self._entering if entry not in prefills]
                if not self._text.is_busy:  # else the thread at work does so
                    self._batcher.remove_done()

    def render_media(self, request: MediaRequest) -> list[Medium]:
        """Wait for the media of a request; see `DecoderQueue.render`."""
        device = self.model.decoders[request.key].device
        name = request.key if device.type == "cpu" else str(device)
        queue = self._queues.setdefault(name, DecoderQueue(self.model, self._gather))
        return queue.render(request)

    def _gather(self, queue: DecoderQueue) -> None:
        """Give other callers the time to ask for media, too, if there are any."""
        if max(self._text.num_waiting, queue.num_waiting) > 1:
            time.sleep(_GATHER_SECONDS)

    def _step(self) -> None:
        """Let new sequences join, and take a step with all."""
        with self._text.changed:
            entering, self._entering = self._entering, []
        new = [sequence for prefill in entering for sequence in prefill.sequences]
        try:
            for prefill in entering:
                self._join(prefill)
            self._batcher.step()
        except BaseException as error:  # the step was that of all
            for sequence in [*self._batcher.sequences, *new]:
                sequence.error, sequence.done = error, True
            self._batcher.clear()
            if not isinstance(error, Exception):
                raise

    def _join(self, prefill: Prefill) -> None:
        """Prefill prompts; an error in them does not reach the other sequences."""
        if all(sequence.done for sequence in prefill.sequences):
            return
        try:
            self._batcher.join(prefill)
        except Exception as error:
            for sequence in prefill.sequences:
                sequence.error, sequence.done = error, True
