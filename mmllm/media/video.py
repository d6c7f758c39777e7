"""Clips, and sounds in containers, by PyAV; animations by Pillow. Frames are taken by time.

Legend: F frames, H x W pixels, C channels, S samples.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmllm.conversation import Audio, Video
from mmllm.errors import MediaError
from mmllm.media import audio as sounds
from mmllm.media import provenance
from mmllm.media.files import brief, timed
from mmllm.media.info import MediaInfo
from mmllm.media.limits import DecodingCost, check_limit, current_limits

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

log = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".webp", ".gif")
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,wav,mp3,flac,aac,asf,flv,au,caf,w64,"
    "voc"
)
"""What FFmpeg may open. Playlists are not among them: they would make it open other files."""
_AV_TIME = 1_000_000  # av.time_base, without importing av
_SKIPPED = 2.0
"""Seconds of a clip that are worth looking for another keyframe."""
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read the transparency of WebM; FFmpeg's own leave it out."""


@contextmanager
def _container(file: BinaryIO, name: str, cost: DecodingCost) -> Iterator[InputContainer]:
    """The opened container; whatever is raised about it inside the block is a MediaError."""
    try:
        with _open(file, cost) as container:
            yield container
    except MediaError:
        raise
    except Exception as error:  # PyAV raises ValueError and others, too, where frames are odd
        cost.check()  # it may be what it stumbled over
        why = getattr(error, "strerror", None) or brief(error)
        raise MediaError(
            f"{name}: the file is damaged, truncated, or in no format that is known "
            f"({why}); was it copied completely?"
        ) from error


def _open(file: BinaryIO, cost: DecodingCost) -> InputContainer:
    import av

    options = {"format_whitelist": _CONTAINERS, "max_pixels": str(current_limits().pixels)}
    return av.open(timed(file, cost), "r", options=options, metadata_errors="replace")


def _picture_stream(container: InputContainer) -> Any | None:
    """The first video stream in a known codec that is not the cover of a song."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if stream.codec_context and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def _sound_stream(container: InputContainer) -> Any | None:
    """The first audio stream in a known codec."""
    return next((stream for stream in container.streams.audio if stream.codec_context), None)


def probe(file: BinaryIO, name: str, cost: DecodingCost) -> MediaInfo | None:
    """What the container says, or None when FFmpeg does not know it.

    Packets are counted (not decoded) where the header does not say how many there are.
    """
    try:
        with _open(file, cost) as container:
            return _facts(container, name)
    except MediaError:
        raise
    except Exception:
        cost.check()
        return None


def _facts(container: InputContainer, name: str) -> MediaInfo | None:
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
            seconds = _measure(container, sound, name)[1]
        samples = round(seconds * sound.rate)
        return MediaInfo("audio", kind, seconds=seconds, samples=samples, by_av=True, **rate)
    count = _num_shown(container, picture)
    if not count or not seconds:
        count, measured = _measure(container, picture, name)
        # The container's duration is that of its longest stream, which may be the sound.
        own = seconds if picture.duration else None
        seconds = own or measured or seconds or count / float(picture.guessed_rate or 25)
    width, height = _stretched(picture, picture.width, picture.height)
    return MediaInfo(
        "video",
        kind,
        width=width,
        height=height,
        frames=count,
        seconds=seconds,
        samples=round(seconds * sound.rate) if sound else 0,
        by_av=True,
        **rate,
    )


def _seconds(container: InputContainer, stream: Any) -> float | None:
    if stream.duration and stream.duration > 0:
        return float(stream.duration * stream.time_base)
    duration = container.duration
    return duration / _AV_TIME if duration and duration > 0 else None


def _num_shown(container: InputContainer, stream: Any) -> int:
    """The frames that the header announces, without those that an edit list hides (MP4), or that
    only say that the one before stays (AVI); 0: unknown."""
    index, kind = stream.index_entries, container.format.name
    if not 0 < len(index) <= current_limits().frames:
        return stream.frames
    # AVI counts by its frames, and has its index at its end: one that was cut has a few entries.
    whole = kind == "avi" and index[-1].timestamp >= 0.9 * stream.frames - 1
    if not (whole or "mp4" in kind):
        return stream.frames
    return min(stream.frames, sum(bool(entry.size) and not entry.is_discard for entry in index))


def _stretched(stream: Any, width: int, height: int) -> tuple[int, int]:
    """The size at which frames are shown: pixels that are not square are stretched to be."""
    aspect = stream.sample_aspect_ratio
    if not aspect or aspect <= 0 or aspect == 1:
        return width, height
    if aspect > 1:
        return round(width * aspect), height
    return width, round(height / aspect)


def _measure(container: InputContainer, stream: Any, name: str) -> tuple[int, float]:
    """(packets that are shown, seconds) of a stream, by reading through the file once.

    Raises MediaError where the file ends long before the duration that its header announces.
    """
    count, first, last, end, stays = 0, None, 0, 0.0, 0
    for packet in container.demux():
        if not packet.size or packet.pts is None or packet.is_discard:
            count += bool(packet.size) and packet.stream is stream and not packet.is_discard
            continue
        after = packet.pts + (packet.duration or 0)
        end = max(end, float(after * packet.time_base))
        if packet.stream is stream:
            count += 1
            stays = stays or packet.duration or 0
            first = packet.pts if first is None else min(first, packet.pts)
            last = max(last, after)
    announced = (container.duration or 0) / _AV_TIME
    if end < 0.9 * announced - 1.0:  # the last packet's own duration is not always known
        raise MediaError(
            f"{name}: the file is truncated ({announced:.4g} seconds announced, {end:.4g} found); "
            "was it copied completely?"
        )
    span = last - (first or 0)
    if not stays and count > 1:  # FLV says when each begins only; the last one stays as the others
        span += span / (count - 1)
    return count, float(span * stream.time_base)


# --- reading ------------------------------------------------------------------------------------


def frames_at(
    file: BinaryIO, name: str, facts: MediaInfo, times: Sequence[float], cost: DecodingCost
) -> np.ndarray:
    """uint8[len(times), H, W, 3]: what is on screen at each of the ascending times, in seconds.
    All have the size of the first, upright, with square pixels, on white."""
    chosen = _Chosen(name, len(times))
    shown: av.VideoFrame | None = None
    with _container(file, name, cost) as container:
        stream = _picture_stream(container)
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
        self.container, self.stream, self.decoder = container, stream, _decoder(stream)
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
            for frame in _decoded(self.container, self.stream, self.decoder, self.cost):
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
                f"{self.name}: the clip is truncated ({self.facts.frames} frames announced, "
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


def _decoder(stream: Any) -> Any:
    """The stream's own decoder, or the one that reads its transparency."""
    import av

    decoder = stream.codec_context
    better = _WITH_ALPHA.get(decoder.name)
    if better in av.codecs_available and stream.metadata.get("alpha_mode") == "1":
        decoder = av.CodecContext.create(better, "r")
    decoder.options = {"max_pixels": str(current_limits().pixels)}
    return decoder


def _decoded(
    container: InputContainer, stream: Any, decoder: Any, cost: DecodingCost
) -> Iterator[Any]:
    """The frames of a stream."""
    for packet in container.demux(stream):
        cost.check()
        if packet.size or packet.dts is None:  # the end has no time; an empty one holds nothing
            yield from decoder.decode(packet)


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
            self._size = _stretched(self._stream, frame.width, frame.height)
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


def read_sound(file: BinaryIO, name: str, facts: MediaInfo, cost: DecodingCost) -> Audio:
    """The first sound track: float32[C, S] at its own rate, provenance included."""
    allowed = current_limits()
    array, length, rate = np.empty((0, 0), np.float32), 0, 0
    with _container(file, name, cost) as container:
        stream = _sound_stream(container)
        assert stream is not None  # the probe saw it
        for rate, block in _blocks(container, stream, cost):
            end = length + block.shape[1]
            check_limit(name, "seconds", end / rate, "seconds")
            check_limit(name, "decoded_bytes", 4 * len(block) * end, "bytes when decoded")
            if end > array.shape[1]:
                # What is not written takes no memory, so the announced length may be any.
                most = int(min(allowed.seconds * rate, allowed.decoded_bytes / 4 / len(block)))
                room = max(end, min(most, facts.samples + rate if not length else 2 * end))
                longer = np.empty((len(block), room), np.float32)
                if length:
                    longer[:, :length] = array[:, :length]
                array = longer
            array[:, length:end] = block
            length = end
        mark = provenance.from_comment(container.metadata.get("comment"))
        kind = container.format.name
        known = "mp4" in kind or kind in (
            "wav",
            "caf",
        )  # others' durations may be guesses by the bit rate
        announced = round((stream.duration or 0) * (stream.time_base or 0) * rate) if known else 0
    if not length:
        raise MediaError(f"{name}: the sound holds no samples")
    if length < 0.9 * announced:
        raise MediaError(
            f"{name}: the sound is truncated ({announced} samples announced, {length} found); was "
            "it copied completely?"
        )
    # Codecs with fixed blocks (AAC: 1024 samples) fill the last one with what was never there.
    length = min(length, announced) if announced > 0 else length
    array = sounds.checked(array[:, :length], name)
    return Audio(array=array, sample_rate=rate, provenance=mark)


def _blocks(
    container: InputContainer, stream: Any, cost: DecodingCost
) -> Iterator[tuple[int, np.ndarray]]:
    """(samples per second, float32[C, S]) of each part of a sound. Rate and channels are those of
    the first; where they change in the middle, the rest is brought back to them."""
    import av

    target: tuple[Any, int] | None = None
    kind, resampler = None, None
    for frame in _decoded(container, stream, stream.codec_context, cost):
        target = target or (frame.layout, frame.sample_rate)
        if kind != (frame.format.name, frame.layout.name, frame.sample_rate):
            if resampler is not None:
                yield from ((target[1], block.to_ndarray()) for block in resampler.resample(None))
            kind = (frame.format.name, frame.layout.name, frame.sample_rate)
            resampler = av.AudioResampler(format="fltp", layout=target[0], rate=target[1])
        assert resampler is not None
        yield from ((target[1], block.to_ndarray()) for block in resampler.resample(frame))
    if resampler is not None and target is not None:
        yield from ((target[1], block.to_ndarray()) for block in resampler.resample(None))


def read_provenance(file: BinaryIO, name: str, cost: DecodingCost) -> dict[str, Any] | None:
    """The mark of a clip or sound in a container."""
    with _container(file, name, cost) as container:
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
        track = _SoundTrack(container, video.audio) if video.audio is not None else None
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
