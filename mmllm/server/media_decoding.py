"""Media of requests, decoded in other processes within limits of time and memory.

A process whose decoding takes too long, or whose request is gone, is ended. Of a video only the
frames that the model looks at are decoded, unless an encoder reads its length or its track.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from mmllm import media
from mmllm.conversation import Medium, SampledVideo, Video
from mmllm.media import MediaSource, isolated
from mmllm.media.info import MediaContent
from mmllm.server.errors import ApiError
from mmllm.server.settings import ServerSettings

T = TypeVar("T")

_GRACE_SECONDS = 2.0
"""Extra seconds in which a process can report its own timeout before it is killed."""


@dataclass
class DecodeBudget:
    """Limits on the media of one request.

    Args:
        bytes_left: Bytes that its decoded media may still take.
        frame_counts: For each number, that many frames of a video are decoded.
        needs_whole_videos: Whether videos are decoded whole instead.
        cancel: Set when the request is parsed or gone; its decoding stops.
    """

    bytes_left: int
    frame_counts: Sequence[int]
    needs_whole_videos: bool = False
    cancel: threading.Event = field(default_factory=threading.Event)


class MediaDecoder:
    """Decodes media for one server, in a pool for videos and one for the rest."""

    def __init__(self, settings: ServerSettings):
        self._limits = settings.input_limits
        self._pools = {
            name: (asyncio.Semaphore(num), ThreadPoolExecutor(num, f"mmllm-{name}"))
            for name, num in isolated.PROCESSES.items()
        }
        self._memory = _DecodedMemory(settings.max_total_decoded_bytes)

    def is_full(self, modality: str) -> bool:
        """Whether all workers for a modality are decoding."""
        return self._pools[_pool(modality)][0].locked()

    async def decode(
        self, modality: str, open_medium: Callable[[], Medium], budget: DecodeBudget
    ) -> Medium:
        """Decode a medium in a worker thread, which waits for the process that does it.

        Args:
            modality: Of the medium; videos have a pool of their own. "mask": of an image the
                transparency, white on black.
            open_medium: Called in the worker, because it may parse megabytes of base64.
            budget: Of its request.

        Raises:
            MediaError: The medium cannot be decoded within the limits.
            ApiError: 429, the media of all requests take too much memory.
        """

        def work() -> Medium:
            return self._decode(open_medium(), budget, modality)

        medium = await self._in_pool(_pool(modality), work)
        self._memory.add(medium)
        return medium

    async def _in_pool(self, name: str, work: Callable[[], T]) -> T:
        free, pool = self._pools[name]
        async with free:
            with media.limits(self._limits):
                context = contextvars.copy_context()
            return await asyncio.get_running_loop().run_in_executor(pool, context.run, work)

    def _decode(self, medium: Medium, budget: DecodeBudget, modality: str) -> Medium:
        if budget.cancel.is_set():
            raise isolated.DecodingCancelledError("nobody waits for it any more")
        limits = replace(media.current_limits(), decoded_bytes=budget.bytes_left)
        seconds = limits.decoding_seconds + _GRACE_SECONDS
        deadline = time.monotonic() + seconds

        def sample(source: MediaSource, num: int) -> np.ndarray:
            left = max(deadline - time.monotonic(), 0.0)
            return isolated.sample_frames(source, num, seconds=left, cancel=budget.cancel)

        def decode(source: MediaSource, _: str) -> MediaContent:
            return isolated.decode(source, modality, seconds=seconds, cancel=budget.cancel)

        with media.limits(limits):
            if isinstance(medium, Video) and not budget.needs_whole_videos:
                medium = medium.presampled(budget.frame_counts, sample)
            else:
                medium = medium.decoded(decode)
        taken = sum(array.nbytes for array in _arrays(medium))
        budget.bytes_left = max(budget.bytes_left - taken, 0)
        return medium


def _pool(modality: str) -> str:
    """The pool of `isolated.PROCESSES` that decodes a modality."""
    return "videos" if modality == "video" else "others"


class _DecodedMemory:
    """Counts the bytes of decoded arrays of all requests until they are garbage-collected."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._arrays: list[weakref.ref[np.ndarray]] = []

    def add(self, medium: Medium) -> None:
        """Raise ApiError (429) if the total exceeds the limit; a single array always may."""
        alive = [array for entry in self._arrays if (array := entry()) is not None]
        added = _arrays(medium)
        if alive and sum(array.nbytes for array in [*alive, *added]) > self._max_bytes:
            raise ApiError(
                429, "too many large media at the same time; try again soon", code="busy"
            )
        self._arrays = [weakref.ref(array) for array in [*alive, *added]]


def _arrays(medium: Medium) -> list[np.ndarray]:
    """The decoded arrays of a medium."""
    if isinstance(medium, SampledVideo):
        return list(medium.sampled.values())
    return [] if medium.array is None else [medium.array]
