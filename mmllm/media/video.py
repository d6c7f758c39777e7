"""Frames of a video at given times, read by PyAV; for animations see mmllm.media.image.

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

SUFFIXES = (".mp4", ".webm", ".webp", ".gif")
_SKIPPED = 2.0
"""Minimum seconds of video to skip for which a seek to another keyframe pays off."""


def frames_at(
    file: BinaryIO, name: str, facts: MediaInfo, times: Sequence[float], cost: DecodingCost
) -> np.ndarray:
    """Decode the frames of a video that are displayed at given times.

    Args:
        file: the video.
        name: its name in messages.
        facts: what `probe` returned.
        times: ascending times in seconds.
        cost: counts the work.

    Returns:
        uint8[len(times), H, W, 3], rotated by the display matrix, with square pixels, on white, all
        of the size of the first frame.

    Raises:
        MediaError: the video is damaged or truncated, or exceeds the limits.
    """
    chosen = _Chosen(name, len(times))
    shown: av.VideoFrame | None = None
    with open_container(file, name, cost) as container:
        stream = video_stream(container)
        assert stream is not None  # the probe found it
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
    """A reader of the frames of a video in order that seeks to later keyframes where possible."""

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
        """Times in seconds of the keyframes in the container's index that are still ahead."""
        self.last = 0.0
        """Time in seconds of the last frame in the index."""

    def find_keys(self) -> None:
        """Look up the keyframes, in container formats that support exact seeking."""
        kind = self.container.format.name
        if self.decoder is self.stream.codec_context and ("mp4" in kind or "matroska" in kind):
            self.container.seek(0, stream=self.stream)  # makes Matroska read its index
            unit = float(self.stream.time_base)
            index = [entry for entry in self.stream.index_entries if not entry.is_discard]
            self.keys = sorted(entry.timestamp * unit for entry in index if entry.is_keyframe)
            self.last = max((entry.timestamp * unit for entry in index), default=0.0)

    def frames(self, wanted: Callable[[], float]) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yield (start in seconds, frame) of the decoded frames.

        Args:
            wanted: returns the next time, in seconds, at which a frame is needed; frames before
                it may be skipped.

        Raises:
            MediaError: the video is truncated.
        """
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
                    # The seek went too far: start again without seeking.
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
        """Seek to the last keyframe before time `then` if that skips enough; return whether it did.

        Frames that precede a keyframe in time may follow it in the file and need skipped frames.
        None of them is used, since the keyframe is at least one second before `then`.
        """
        place = bisect_right(self.keys, then - 1.0) - 1
        if place < 0 or self.keys[place] < now + _SKIPPED:
            return False
        # The index of MP4 has decoding times. With B-frames, display times are later, and FFmpeg
        # may land on the keyframe before. So each keyframe is used for one seek only.
        del self.keys[: place + 1]
        self.container.seek(round((then - 1.0) / self.stream.time_base), stream=self.stream)
        return True


class _Chosen:
    """The array of selected frames; it is allocated when the size of the first frame is known."""

    def __init__(self, name: str, num: int) -> None:
        self.name, self.num, self.count = name, num, 0
        self.array = np.empty(0, np.uint8)
        self._last: av.VideoFrame | None = None

    @property
    def full(self) -> bool:
        """Whether all frames have been added."""
        return self.count == self.num

    def add(self, frame: av.VideoFrame, view: _View) -> None:
        """Convert a frame and append it. Raises OversizedMediaError if the array is too large."""
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
    """The conversion of frames to RGB; size and rotation are those of the first frame."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._size: tuple[int, int] | None = None
        self._matrix = np.zeros(0, np.int32)

    def begin(self, frame: av.VideoFrame) -> None:
        """Set size and rotation from the first frame, whether it is selected or not."""
        if self._size is None:
            self._size = square_size(self._stream, frame.width, frame.height)
            side = frame.side_data.get("DISPLAYMATRIX")
            self._matrix = np.array(np.frombuffer(side, np.int32)) if side else self._matrix

    def picture(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a frame to uint8[H, W, 3]."""
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
    """Blend transparency onto white: uint8[H, W, 4] -> uint8[H, W, 3]."""
    alpha = array[..., 3:].astype(np.uint16)
    return ((array[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _turned(array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rotate uint8[H, W, 3] by multiples of 90 degrees and mirror it by a display matrix (ISO
    14496-12, 8.3.2), which maps (x, y) to (a x + c y, b x + d y)."""
    if len(matrix) < 5:
        return array
    a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
    if abs(a) + abs(d) < abs(b) + abs(c):
        array, a, d = array.transpose(1, 0, 2), c, b
    return array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def middles(num: int, seconds: float) -> list[float]:
    """Return the times in seconds of the middles of equal parts of a video.

    Args:
        num: the number of parts.
        seconds: the duration of the video.

    Example:
        >>> middles(2, 10.0)
        [2.5, 7.5]
    """
    return [(i + 0.5) * seconds / num for i in range(num)]
