"""Clips, and sounds in containers, by PyAV; animations by Pillow. Frames are taken by time.

Legend: F frames, H x W pixels, C channels, S samples.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmllm.conversation import Audio, Video
from mmllm.errors import MediaError
from mmllm.media import audio as sounds
from mmllm.media import provenance
from mmllm.media.facts import Facts
from mmllm.media.limits import current_limits

if TYPE_CHECKING:
    from av.container import InputContainer

log = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".webp", ".gif")
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,wav,mp3,flac,aac,asf,flv"
"""What FFmpeg may open. Playlists are not among them: they would make it open other files."""
_AV_TIME = 1_000_000  # av.time_base, without importing av
_COVER = "attached_pic"


@contextmanager
def _container(file: BinaryIO, name: str) -> Iterator[InputContainer]:
    """The opened container; what FFmpeg finds wrong inside the block is a MediaError."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(file, "r", options={"format_whitelist": _CONTAINERS}) as container:
            yield container
    except FFmpegError as error:
        raise MediaError(
            f"{name}: the file is damaged, truncated, or in no format that is known "
            f"({error.strerror}); was it copied completely?"
        ) from error


def _picture_stream(container: InputContainer) -> Any | None:
    """The first video stream in a known codec that is not the cover of a song."""
    for stream in container.streams.video:
        if stream.codec_context and _COVER not in str(stream.disposition):
            return stream
    return None


def _sound_stream(container: InputContainer) -> Any | None:
    """The first audio stream in a known codec."""
    return next((stream for stream in container.streams.audio if stream.codec_context), None)


def probe(file: BinaryIO, name: str) -> Facts | None:
    """What the container says, or None when FFmpeg does not know it.

    Packets are counted (not decoded) where the header does not say how many there are.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(file, "r", options={"format_whitelist": _CONTAINERS}) as container:
            picture = _picture_stream(container)
            sound = _sound_stream(container)
            stream = picture or sound
            if stream is None:
                return None
            seconds = _seconds(container, stream)
            kind = container.format.name
            rate = {"sample_rate": sound.rate, "channels": sound.channels} if sound else {}
            if picture is None:
                assert sound is not None
                if seconds is None:
                    seconds = _measure(container, sound)[1]
                samples = round(seconds * sound.rate)
                return Facts("audio", kind, seconds=seconds, samples=samples, by_av=True, **rate)
            count = picture.frames
            if not count or not seconds:
                count, measured = _measure(container, picture)
                seconds = seconds or measured or count / float(picture.guessed_rate or 25)
            return Facts(
                "video",
                kind,
                width=picture.width,
                height=picture.height,
                frames=count,
                seconds=seconds,
                samples=round(seconds * sound.rate) if sound else 0,
                by_av=True,
                **rate,
            )
    except FFmpegError:
        return None


def _seconds(container: InputContainer, stream: Any) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / _AV_TIME if container.duration else None


def _measure(container: InputContainer, stream: Any) -> tuple[int, float]:
    """(packets, seconds) of a stream, by reading through the file once."""
    count, first, last = 0, None, 0
    for packet in container.demux(stream):
        if packet.size:
            count += 1
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                last = max(last, packet.pts + (packet.duration or 0))
    return count, float((last - (first or 0)) * stream.time_base)


# --- reading ------------------------------------------------------------------------------------


def frames(file: BinaryIO, name: str, facts: Facts) -> Iterator[tuple[float, np.ndarray]]:
    """(start in seconds, uint8[H, W, 3] upright) of each frame, decoded one after the other."""
    with _container(file, name) as container:
        stream = _picture_stream(container)
        assert stream is not None
        announced, seen, first = stream.frames, 0, None
        for frame in container.decode(stream):
            time = frame.time if frame.time is not None else seen * facts.seconds / facts.frames
            first = time if first is None else first
            seen += 1
            array = frame.to_ndarray(format="rgb24")
            if frame.rotation:
                array = np.rot90(array, frame.rotation // 90)
            yield time - first, array
        if seen == 0 or seen < 0.9 * announced:
            raise MediaError(
                f"{name}: the clip is truncated ({announced} frames announced, {seen} found); was "
                "it copied completely?"
            )


def at_times(timed: Iterable[tuple[float, np.ndarray]], times: Sequence[float]) -> np.ndarray:
    """uint8[len(times), H, W, 3]: what is on screen at each of the ascending times, in seconds."""
    chosen: list[np.ndarray] = []
    shown: np.ndarray | None = None
    for start, frame in timed:
        while shown is not None and len(chosen) < len(times) and start > times[len(chosen)] + 1e-6:
            chosen.append(shown)
        if len(chosen) == len(times):
            break
        shown = frame
    assert shown is not None
    chosen += [shown] * (len(times) - len(chosen))
    return np.stack(chosen)


def middles(num: int, seconds: float) -> list[float]:
    """The middle of each of `num` equal parts of a clip: even in time, safe from rounding."""
    return [(i + 0.5) * seconds / num for i in range(num)]


def read_sound(file: BinaryIO, name: str) -> Audio:
    """The first sound track: float32[C, S] at its own rate, provenance included."""
    import av

    blocks: list[np.ndarray] = []
    with _container(file, name) as container:
        stream = _sound_stream(container)
        assert stream is not None  # the probe saw it
        rate, longest = stream.rate, current_limits().seconds
        resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
        length = 0
        for frame in container.decode(stream):
            for block in resampler.resample(frame):
                blocks.append(block.to_ndarray())
                length += blocks[-1].shape[1]
            if length > longest * rate:
                raise MediaError(f"{name}: the sound is longer than the limit of {longest} s")
        blocks += [block.to_ndarray() for block in resampler.resample(None)]
        mark = provenance.from_comment(container.metadata.get("comment"))
        announced = round((stream.duration or 0) * (stream.time_base or 0) * rate)
    if not blocks:
        raise MediaError(f"{name}: the sound holds no samples")
    # Codecs with fixed blocks (AAC: 1024 samples) fill the last one with what was never there.
    array = sounds.checked(np.concatenate(blocks, axis=1)[:, : announced or None], name)
    return Audio(array=array, sample_rate=rate, provenance=mark)


def read_provenance(file: BinaryIO, name: str) -> dict[str, Any] | None:
    """The mark of a clip or sound in a container."""
    with _container(file, name) as container:
        return provenance.from_comment(container.metadata.get("comment"))


# --- writing ------------------------------------------------------------------------------------


_REPRODUCIBLE = {"x264-params": "mbtree=0"}
"""The same clip gives the same bytes. x264's macroblock tree reads memory that nobody has written:
about one file in 200 of a 32-pixel clip differed with it, none of 10,000 without."""


def save_mp4(video: Video, path: Path) -> None:
    """Write H.264 (MPEG-4 part 2 where that is missing) and AAC, playable while it loads.

    Odd sides grow by one pixel (the last one repeated): 4:2:0 colour wants even ones.
    """
    import av

    array = video.to_numpy()
    array = np.pad(
        array, ((0, 0), (0, array.shape[1] % 2), (0, array.shape[2] % 2), (0, 0)), mode="edge"
    )
    h264 = "libx264" in av.codecs_available
    assert video.fps
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if video.provenance is not None:
            container.metadata["comment"] = provenance.to_comment(video.provenance)
        pictures = container.add_stream(
            "libx264" if h264 else "mpeg4", rate=Fraction(video.fps).limit_denominator(1001)
        )
        pictures.height, pictures.width = array.shape[1:3]
        pictures.pix_fmt = "yuv420p"
        if h264:
            pictures.options = {"crf": "16", "preset": "medium", **_REPRODUCIBLE}
        else:
            pictures.bit_rate = 4_000_000
        track = _SoundTrack(container, video.sound) if video.sound is not None else None
        for image in array:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        if track is not None:
            track.write()


class _SoundTrack:
    """AAC beside the pictures; the stream must exist before the first packet is written."""

    def __init__(self, container: Any, sound: Audio) -> None:
        sound = sounds.decoded(sound)
        samples = sound.to_numpy()
        if samples.shape[0] > 2:
            samples = samples.mean(axis=0, keepdims=True)
        if sound.sample_rate not in (16000, 22050, 24000, 32000, 44100, 48000):
            samples = sounds.resample(
                Audio.from_numpy(samples, sound.sample_rate or 0), 48000, mono=False
            ).to_numpy()
            self.rate = 48000
        else:
            self.rate = sound.sample_rate
        self.samples = np.ascontiguousarray(samples)
        self.layout = "mono" if samples.shape[0] == 1 else "stereo"
        self.container = container
        self.stream = container.add_stream("aac", rate=self.rate, layout=self.layout)

    def write(self) -> None:
        import av

        frame = av.AudioFrame.from_ndarray(self.samples, format="fltp", layout=self.layout)
        frame.sample_rate = self.rate
        frame.pts = 0
        self.container.mux(self.stream.encode(frame))
        self.container.mux(self.stream.encode(None))
