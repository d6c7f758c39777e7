"""Frames of a video by time, read by PyAV; for animations see mmllm.media.image.

Legend: F frames, H x W pixels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmllm.errors import MediaError
from mmllm.media.container import (
    decode_packets,
    open_container,
    open_decoder,
    square_size,
    video_stream,
)
from mmllm.media.info import MediaInfo
from mmllm.media.limits import DecodingCost, check_limit

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

SUFFIXES = (".mp4", ".webp", ".gif")
_SKIPPED = 2.0
"""Seconds of a video that are worth seeking another keyframe for."""


def frames_at(
    file: BinaryIO, name: str, facts: MediaInfo, times: Sequence[float], cost: DecodingCost
) -> np.ndarray:
    """uint8[len(times), H, W, 3]: what is on screen at each of the ascending times, in seconds.
    All have the size of the first, upright, with square pixels, on white."""
    chosen = _Chosen(name, len(times))
    shown: av.VideoFrame | None = None
    with open_container(file, name, cost) as container:
        stream = video_stream(container)
        assert stream is not None  # the probe saw it
        view = _View(stream)
        reader = _Reader(container, stream, name, facts, cost)
        if facts.seconds > _SKIPPED * len(times):
            reader.find_keys()
        for start, frame in reader.frames(lambda: times[chosen.count]):
            view.begin(frame)
            while shown is not None and not chosen.full and start > times[chosen.count] + 1e-6:
                chosen.add(shown, view)
            if chosen.full:
                break
            shown = frame
        assert shown is not None
        while not chosen.full:
            chosen.add(shown, view)
    return chosen.array


class _Reader:
    """The frames of a clip in order, from one keyframe to the next that is worth a leap."""

    def __init__(
        self,
        container: InputContainer,
        stream: Any,
        name: str,
        facts: MediaInfo,
        cost: DecodingCost,
    ) -> None:
        self.container, self.stream, self.decoder = container, stream, open_decoder(stream)
        self.name, self.facts, self.cost = name, facts, cost
        self.keys: list[float] = []
        """When the keyframes come that the container's index knows, in seconds."""
        self.last = 0.0
        """When the last frame of the index comes."""

    def find_keys(self) -> None:
        """Look up the keyframes, in containers that are known to find them again exactly."""
        kind = self.container.format.name
        if self.decoder is self.stream.codec_context and ("mp4" in kind or "matroska" in kind):
            self.container.seek(0, stream=self.stream)  # Matroska reads its index only now
            unit = float(self.stream.time_base)
            index = [entry for entry in self.stream.index_entries if not entry.is_discard]
            self.keys = sorted(entry.timestamp * unit for entry in index if entry.is_keyframe)
            self.last = max((entry.timestamp * unit for entry in index), default=0.0)

    def frames(self, wanted: Callable[[], float]) -> Iterator[tuple[float, av.VideoFrame]]:
        """(start in seconds, frame) of each that is decoded, until after the time that is wanted
        next; those in between may be left out."""
        first, seen, time, leapt = None, 0, 0.0, False
        going_on = True
        while going_on:
            going_on, landed = False, not leapt
            for frame in decode_packets(self.container, self.stream, self.decoder, self.cost):
                self.cost.add_frame(frame.width, frame.height)
                time = frame.time
                if time is None:
                    time = seen * self.facts.seconds / self.facts.frames
                first = time if first is None else first
                seen += 1
                if not landed and time - first > wanted():
                    # Too far: from the beginning, without leaps.
                    self.keys, leapt, seen, going_on = [], False, 0, True
                    self.container.seek(0, stream=self.stream)
                    break
                landed = True
                yield time - first, frame
                if self._leap(time, first + wanted()):
                    leapt = going_on = True
                    break
        if leapt and first is not None:
            whole = time - first >= 0.9 * (self.last - first)
        else:
            whole = seen >= 0.9 * self.facts.frames or not self.stream.frames
        if not seen or not whole:
            raise MediaError(
                f"{self.name}: the video is truncated ({self.facts.frames} frames announced, "
                f"{seen} found); was it copied completely?"
            )

    def _leap(self, now: float, then: float) -> bool:
        """Go on at the last keyframe before `then`, if that leaves out enough. The frames before a
        keyframe in time, which may come after it in the file, need what is left out; so does none
        that is looked at, since a second is kept between."""
        place = bisect_right(self.keys, then - 1.0) - 1
        if place < 0 or self.keys[place] < now + _SKIPPED:
            return False
        # The index of MP4 says when a keyframe is decoded; by when it is shown, which is later
        # where there are B-frames, FFmpeg may land at the one before. So: once for each.
        del self.keys[: place + 1]
        self.container.seek(round((then - 1.0) / self.stream.time_base), stream=self.stream)
        return True


class _Chosen:
    """The frames that are kept, in an array that is made when the size of the first is known."""

    def __init__(self, name: str, num: int) -> None:
        self.name, self.num, self.count = name, num, 0
        self.array = np.empty(0, np.uint8)
        self._last: av.VideoFrame | None = None

    @property
    def full(self) -> bool:
        return self.count == self.num

    def add(self, frame: av.VideoFrame, view: _View) -> None:
        if frame is self._last:
            self.array[self.count] = self.array[self.count - 1]
        else:
            picture = view.picture(frame)
            if not self.count:
                size = self.num * picture.nbytes
                check_limit(self.name, "decoded_bytes", size, "bytes when decoded")
                self.array = np.empty((self.num, *picture.shape), np.uint8)
            self.array[self.count] = picture
        self._last = frame
        self.count += 1


class _View:
    """How the frames of a stream are shown: the first one's size and turn hold for all."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._size: tuple[int, int] | None = None
        self._matrix = np.zeros(0, np.int32)

    def begin(self, frame: av.VideoFrame) -> None:
        """Look at the first frame, whether it is kept or not."""
        if self._size is None:
            self._size = square_size(self._stream, frame.width, frame.height)
            side = frame.side_data.get("DISPLAYMATRIX")
            self._matrix = np.array(np.frombuffer(side, np.int32)) if side else self._matrix

    def picture(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8[H, W, 3]."""
        assert self._size is not None
        scaled = {}
        if self._size != (frame.width, frame.height):
            scaled = dict(zip(("width", "height"), self._size, strict=True))
        if any(part.is_alpha for part in frame.format.components) or frame.format.has_palette:
            array = _on_white(frame.to_ndarray(format="rgba", **scaled))
        else:
            array = frame.to_ndarray(format="rgb24", **scaled)
        return _turned(array, self._matrix)


def _on_white(array: np.ndarray) -> np.ndarray:
    """uint8[H, W, 4] -> uint8[H, W, 3]: transparency laid on white."""
    alpha = array[..., 3:].astype(np.uint16)
    return ((array[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _turned(array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """uint8[H, W, 3] turned by quarters and mirrored as a display matrix (ISO 14496-12, 8.3.2)
    maps it: a place (x, y) is shown at (a x + c y, b x + d y)."""
    if len(matrix) < 5:
        return array
    a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
    if abs(a) + abs(d) < abs(b) + abs(c):
        array, a, d = array.transpose(1, 0, 2), c, b
    return array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def middles(num: int, seconds: float) -> list[float]:
    """The middle of each of `num` equal parts of a clip: even in time, safe from rounding."""
    return [(i + 0.5) * seconds / num for i in range(num)]
