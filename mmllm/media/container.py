"""Containers read by PyAV (FFmpeg): their headers, streams and packets.

Legend: F frames, H x W pixels, C channels, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from mmllm.errors import MediaError
from mmllm.media import provenance
from mmllm.media.files import brief, timed
from mmllm.media.info import MediaInfo
from mmllm.media.limits import DecodingCost, current_limits

if TYPE_CHECKING:
    from av.container import InputContainer

_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,wav,mp3,flac,aac,asf,flv,au,caf,w64,"
    "voc"
)
"""The formats that FFmpeg may open. Playlists are excluded: they make it open other files."""
_AV_TIME = 1_000_000  # av.time_base, without importing av
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read the transparency of WebM; FFmpeg's own decoders ignore it."""


@contextmanager
def open_container(file: BinaryIO, name: str, cost: DecodingCost) -> Iterator[InputContainer]:
    """Open a container with FFmpeg; any exception inside the block becomes a MediaError.

    Args:
        file: the open file.
        name: its name in messages.
        cost: checked at every read, since FFmpeg may read a malformed file for a long time.

    Yields:
        PyAV's container, closed after the block.

    Raises:
        MediaError: the file is damaged, truncated or of an unknown format.
        OversizedMediaError: a limit is exceeded.
    """
    try:
        with _open(file, cost) as container:
            yield container
    except MediaError:
        raise
    except Exception as error:  # PyAV raises ValueError and others for malformed frames
        cost.check()  # an exceeded limit may be the reason
        why = getattr(error, "strerror", None) or brief(error)
        raise MediaError(
            f"{name}: the file is damaged, truncated, or in no format that is known "
            f"({why}); was it copied completely?"
        ) from error


def _open(file: BinaryIO, cost: DecodingCost) -> InputContainer:
    import av

    options = {"format_whitelist": _CONTAINERS, "max_pixels": str(current_limits().pixels)}
    return av.open(timed(file, cost), "r", options=options, metadata_errors="replace")


def video_stream(container: InputContainer) -> Any | None:
    """Return the first video stream with a known codec that is no cover art, or None."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if stream.codec_context and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def audio_stream(container: InputContainer) -> Any | None:
    """Return the first audio stream with a known codec, or None."""
    return next((stream for stream in container.streams.audio if stream.codec_context), None)


def probe(file: BinaryIO, name: str, cost: DecodingCost) -> MediaInfo | None:
    """Read the header of a video or audio container with FFmpeg.

    Packets are counted, but not decoded, if the header does not state their number.

    Args:
        file: the open file, at its beginning.
        name: its name in messages.
        cost: checked at every read.

    Returns:
        Format, size, frames, frame rate and duration; None if FFmpeg cannot read the file.

    Raises:
        MediaError: the file is truncated.
        OversizedMediaError: reading takes too long.
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
    picture = video_stream(container)
    sound = audio_stream(container)
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
        # The container's duration is that of its longest stream, which may be the audio.
        own = seconds if picture.duration else None
        seconds = own or measured or seconds or count / float(picture.guessed_rate or 25)
    width, height = square_size(picture, picture.width, picture.height)
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
    """Return the number of frames in the header, without those that an edit list hides (MP4) or
    that only repeat the previous frame (AVI); 0 if unknown."""
    index, kind = stream.index_entries, container.format.name
    if not 0 < len(index) <= current_limits().frames:
        return stream.frames
    # An AVI has its index at the end: that of a truncated file has only a few entries.
    whole = kind == "avi" and index[-1].timestamp >= 0.9 * stream.frames - 1
    if not (whole or "mp4" in kind):
        return stream.frames
    return min(stream.frames, sum(bool(entry.size) and not entry.is_discard for entry in index))


def square_size(stream: Any, width: int, height: int) -> tuple[int, int]:
    """Return the (width, height) in pixels at which frames are displayed.

    Non-square pixels are stretched in the direction in which they are longer.

    Args:
        stream: PyAV's video stream, which states the aspect ratio of a pixel.
        width: columns of a decoded frame.
        height: rows of a decoded frame.
    """
    aspect = stream.sample_aspect_ratio
    if not aspect or aspect <= 0 or aspect == 1:
        return width, height
    if aspect > 1:
        return round(width * aspect), height
    return width, round(height / aspect)


def _measure(container: InputContainer, stream: Any, name: str) -> tuple[int, float]:
    """Return the number of displayed packets of a stream and its seconds, by demuxing the file.

    Raises MediaError if the file ends long before the duration in its header.
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
    if not stays and count > 1:  # FLV has no durations: the last frame gets the mean of the others
        span += span / (count - 1)
    return count, float(span * stream.time_base)


def open_decoder(stream: Any) -> Any:
    """Return a stream's own decoder, or one that reads its transparency."""
    import av

    decoder = stream.codec_context
    better = _WITH_ALPHA.get(decoder.name)
    if better in av.codecs_available and stream.metadata.get("alpha_mode") == "1":
        decoder = av.CodecContext.create(better, "r")
    decoder.options = {"max_pixels": str(current_limits().pixels)}
    return decoder


def decode_packets(
    container: InputContainer, stream: Any, decoder: Any, cost: DecodingCost
) -> Iterator[Any]:
    """Yield the decoded frames of a stream, checking the cost at every packet.

    Args:
        container: the container to read packets from.
        stream: PyAV's stream whose packets are read.
        decoder: the codec context that decodes them, which need not be the stream's own.
        cost: the cost of decoding this medium.

    Raises:
        OversizedMediaError: decoding takes too long.
    """
    for packet in container.demux(stream):
        cost.check()
        if packet.size or packet.dts is None:  # skips empty packets, but not the final flush
            yield from decoder.decode(packet)


def read_provenance(file: BinaryIO, name: str, cost: DecodingCost) -> dict[str, Any] | None:
    """Read the provenance metadata of a video or audio container from its comment.

    Args:
        file: the open file, at its beginning.
        name: its name in messages.
        cost: checked at every read.

    Returns:
        The metadata that `provenance.to_comment` wrote; None if there is none.

    Raises:
        MediaError: the file cannot be read.
    """
    with open_container(file, name, cost) as container:
        return container_provenance(container)


def container_provenance(container: InputContainer) -> dict[str, Any] | None:
    """Return the provenance in the comment of an open container (WebM: COMMENT), or None."""
    metadata = container.metadata
    return provenance.from_comment(metadata.get("comment") or metadata.get("COMMENT"))
