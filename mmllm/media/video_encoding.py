"""Encoding of videos by PyAV: MP4 (H.264 and AAC) and WebM (VP9 and Opus).

Legend: F frames, H x W pixels, C channels, S samples.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.media import audio, provenance
from mmllm.media.info import MediaContent

_RATES = {
    ".mp4": ("aac", (16000, 22050, 24000, 32000, 44100, 48000)),
    ".webm": ("libopus", (16000, 24000, 48000)),
}
"""Suffix -> the audio codec and its sample rates; other audio is resampled to the highest."""
_MAX_CHANNELS = 2
_REPRODUCIBLE = {"x264-params": "mbtree=0"}
"""Options that make the bytes of a file reproducible. x264's macroblock tree reads uninitialised
memory: about one file in 200 of a 32-pixel video differed with it, none of 10,000 without."""
_FLAGS = {".mp4": {"movflags": "+faststart"}, ".webm": {"fflags": "+bitexact"}}
"""Options of the container: an MP4's index comes first, so that it plays while it downloads;
a WebM has no random identifiers."""


def save(content: MediaContent, path: Path, suffix: str) -> None:
    """Write a video with its audio.

    MP4 is H.264, or MPEG-4 part 2 if x264 is missing. Odd sides are padded by one pixel, a copy of
    the last: 4:2:0 colour requires even sides.

    Args:
        content: frames uint8[T, H, W, 3], their rate in frames per second, the audio track or None,
            and provenance metadata, which is written as the comment.
        path: the file to write.
        suffix: ".mp4" or ".webm".
    """
    import av

    array = content.array
    array = np.pad(
        array, ((0, 0), (0, array.shape[1] % 2), (0, array.shape[2] % 2), (0, 0)), mode="edge"
    )
    codec = _codec(suffix)
    assert content.fps
    with av.open(path, "w", format=suffix[1:], options=_FLAGS[suffix]) as container:
        if content.provenance is not None:
            container.metadata["comment"] = provenance.to_comment(content.provenance)
        stream: Any = container.add_stream(
            codec, rate=Fraction(content.fps).limit_denominator(1001)
        )
        stream.height, stream.width = array.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "16", "preset": "medium", **_REPRODUCIBLE}
        elif codec == "libvpx-vp9":
            stream.bit_rate = 0
            stream.options = {"crf": "24", "cpu-used": "4"}
        else:
            stream.bit_rate = 4_000_000
        track = None
        if content.audio is not None:
            track = _AudioTrack(container, content.audio, *_RATES[suffix])
        for image in array:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None:
            track.write()


def _codec(suffix: str) -> str:
    """Return the video codec of a container."""
    import av

    if suffix == ".webm":
        return "libvpx-vp9"
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


class _AudioTrack:
    """The audio stream of a video; it must be created before the first packet is written."""

    def __init__(
        self, container: Any, content: MediaContent, codec: str, rates: tuple[int, ...]
    ) -> None:
        samples, rate = content.array, content.sample_rate
        assert rate
        if samples.shape[0] > _MAX_CHANNELS:
            samples = samples.mean(axis=0, keepdims=True)
        if rate not in rates:
            samples, rate = audio.resample(samples, rate, rates[-1]), rates[-1]
        self.samples, self.rate = np.ascontiguousarray(samples), rate
        self.layout = "mono" if samples.shape[0] == 1 else "stereo"
        self.container = container
        self.stream = container.add_stream(codec, rate=self.rate, layout=self.layout)

    def write(self) -> None:
        """Encode all samples and finish the stream."""
        import av

        frame = av.AudioFrame.from_ndarray(self.samples, format="fltp", layout=self.layout)
        frame.sample_rate = self.rate
        frame.pts = 0
        self.container.mux(self.stream.encode(frame))
        self.container.mux(self.stream.encode(None))
