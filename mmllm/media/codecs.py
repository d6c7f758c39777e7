"""Decoding and encoding of media files of every modality: probe, decode, sample frames, save.

The header of a file is compared with the limits before the file is decoded.
Legend: H x W pixels, F frames, C channels, S samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.errors import MediaError, quoted
from mmllm.media import audio, audio_track, container, image, video, video_encoding
from mmllm.media.arrays import MAX_SAMPLE_RATE
from mmllm.media.files import MediaSource, name_of, opened, replacing
from mmllm.media.info import MediaContent, MediaInfo
from mmllm.media.limits import DecodingCost, check_limit, check_size, current_limits

log = logging.getLogger(__name__)

_WITH_ARTICLE = {"image": "an image", "audio": "audio", "video": "a video"}
SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": tuple(image.SUFFIXES),
    "audio": tuple(audio.SUFFIXES),
    "video": video.SUFFIXES,
}
"""Modality -> suffixes of the files that can be written."""


def probe(source: MediaSource) -> MediaInfo:
    """Return the modality, format and size of a file from its header, without decoding it.

    Args:
        source: a path, the bytes of a file, or a file inside another.

    Raises:
        MediaError: the file is missing, empty, too large, or neither an image, audio nor a video.
    """
    return _probe(source, DecodingCost(name_of(source)))


def decode(source: MediaSource, modality: str) -> MediaContent:
    """Decode a file.

    Images are rotated by their EXIF orientation, and transparency is blended onto white. Audio
    keeps its own sample rate. Videos have a constant frame rate (a frame that is shown longer is
    repeated) and their audio track.

    Args:
        source: a path, the bytes of a file, or a file inside another.
        modality: the required modality: "image", "audio" or "video"; "mask" is an image whose
            transparency is decoded, as white on black.

    Returns:
        The decoded arrays, see MediaContent.

    Raises:
        MediaError: the file is missing, empty, damaged, of another modality, or exceeds `limits`.
            Sizes are checked from the header before decoding, time and work while decoding.
    """
    cost = DecodingCost(name_of(source))
    info = _probe_as(source, "image" if modality == "mask" else modality, cost)
    _check(info, name_of(source))
    return DECODERS[modality](source, info, cost)


def sample_frames(source: MediaSource, num: int) -> np.ndarray:
    """Decode `num` evenly spaced frames of a video file: uint8[num, H, W, 3].

    The frames are the middles of `num` equal parts; a video of fewer frames repeats them. The file
    is read frame by frame, so that a video too long to be decoded whole (`Limits.decoded_bytes`)
    can still be sampled.

    Args:
        source: a path, the bytes of a file, or a file inside another.
        num: number of frames, at least 1.

    Raises:
        MediaError: as `decode`.
    """
    cost = DecodingCost(name_of(source))
    info = _probe_as(source, "video", cost)
    _check(replace(info, frames=num, samples=0), name_of(source))
    _check(replace(info, width=1, height=1, samples=0), name_of(source))
    return _read_frames(source, info, num, cost)[0]


def output_path(path: str | Path, modality: str) -> Path:
    """Return the path of a file to be written, with `~` expanded.

    Args:
        path: the file; its suffix selects the format.
        modality: image, audio or video.

    Raises:
        MediaError: the modality cannot be saved with this suffix, or there is no home folder.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise MediaError(f"{path}: cannot be written ({error})") from error
    known = SUFFIXES[modality]
    if path.suffix.lower() not in known:
        raise MediaError(
            f"{path}: {_WITH_ARTICLE[modality]} is saved as {', '.join(known)}; got "
            f"{quoted(path.suffix) if path.suffix else 'no suffix'}"
        )
    return path


def save(content: MediaContent, modality: str, path: str | Path) -> Path:
    """Write decoded media atomically in the format of the suffix.

    Image: .png .webp .jpg .gif; audio: .wav .flac .ogg .mp3; video: .mp4 and .webm (with its audio)
    .webp .gif.
    `content.provenance` is written into the file. Missing folders are created.

    Args:
        content: the decoded media.
        modality: "image", "audio" or "video".
        path: the file to write.

    Returns:
        The path, with `~` expanded.

    Raises:
        MediaError: the suffix is unknown, or the file cannot be written.
    """
    path = output_path(path, modality)
    suffix = path.suffix.lower()
    with replacing(path) as temporary:
        if modality == "image":
            image.save(content, temporary, suffix)
        elif modality == "audio":
            audio.save(content, temporary, suffix)
        else:
            _save_video(content, temporary, path)
    return path


def read_provenance(source: MediaSource) -> dict[str, Any] | None:
    """Return the provenance that mmllm wrote into a file that it generated, or None.

    Raises:
        MediaError: as `probe`.
    """
    name = name_of(source)
    cost = DecodingCost(name)
    info = _probe(source, cost)
    reader = container if info.by_av else audio if info.modality == "audio" else image
    with opened(source) as file:
        return reader.read_provenance(file, name, cost)


# --- decoders of each modality ------------------------------------------------------------------


def _decode_image(source: MediaSource, info: MediaInfo, cost: DecodingCost) -> MediaContent:
    with opened(source) as file:
        array, mark = image.decode(file, name_of(source), cost)
    return MediaContent(array, provenance=mark)


def _decode_mask(source: MediaSource, info: MediaInfo, cost: DecodingCost) -> MediaContent:
    with opened(source) as file:
        return MediaContent(image.decode_mask(file, name_of(source), cost))


def _decode_audio(source: MediaSource, info: MediaInfo, cost: DecodingCost) -> MediaContent:
    name = name_of(source)
    with opened(source) as file:
        if info.by_av:
            return audio_track.read_audio(file, name, info, cost)
        array, mark = audio.decode(file, name, info, cost)
        return MediaContent(array, sample_rate=info.sample_rate, provenance=mark)


def _decode_video(source: MediaSource, info: MediaInfo, cost: DecodingCost) -> MediaContent:
    name = name_of(source)
    array, fps = _read_frames(source, info, None, cost)
    track = None
    if info.channels:
        with opened(source) as file:
            track = replace(audio_track.read_audio(file, name, info, cost), provenance=None)
    reader = container if info.by_av else image
    with opened(source) as file:
        mark = reader.read_provenance(file, name, cost)
    return MediaContent(array, fps=fps, audio=track, provenance=mark)


DECODERS: dict[str, Callable[[MediaSource, MediaInfo, DecodingCost], MediaContent]] = {
    "image": _decode_image,
    "mask": _decode_mask,
    "audio": _decode_audio,
    "video": _decode_video,
}


def _read_frames(
    source: MediaSource, info: MediaInfo, num: int | None, cost: DecodingCost
) -> tuple[np.ndarray, float]:
    """Return `num` evenly spaced frames, uint8[num, H, W, 3], and the frames per second of the
    video; all frames if `num` is None."""
    name = name_of(source)
    if info.by_av:
        times = video.middles(num or info.frames, info.seconds)
        with opened(source) as file:
            array = video.frames_at(file, name, info, times, cost)
        return array, info.frames / info.seconds
    with opened(source) as file:
        durations = image.durations(file, name, info.frames, cost)
    fps, seconds = image.frame_rate(durations), sum(durations) / 1000
    info = replace(info, seconds=seconds, frames=round(seconds * fps))
    _check(info if num is None else replace(info, width=1, height=1), name)
    times = video.middles(num or info.frames, info.seconds)
    with opened(source) as file:
        return image.frames_at(file, name, durations, times, cost), fps


def _save_video(content: MediaContent, temporary: Path, path: Path) -> None:
    if not content.fps or content.fps <= 0:
        raise MediaError(f"{path}: expected a positive frame rate, got {content.fps}; pass fps=...")
    suffix = path.suffix.lower()
    if suffix not in image.ANIMATION_SUFFIXES:
        video_encoding.save(content, temporary, suffix)
        return
    if content.audio is not None:
        log.warning("%s: this format holds no audio; .mp4 keeps it", path)
    image.save_animation(content, temporary, suffix)


# --- checks -------------------------------------------------------------------------------------


def _probe(source: MediaSource, cost: DecodingCost) -> MediaInfo:
    """See `probe`."""
    name = name_of(source)
    for reader in (image, audio, container):
        with opened(source) as file:
            info = reader.probe(file, name, cost)
        if info is not None:
            return info
    raise MediaError(
        f"{name}: neither an image, audio nor a video in a format that is known (or one damaged "
        "from its first bytes on); convert it to PNG, WAV or MP4"
    )


def _probe_as(source: MediaSource, modality: str, cost: DecodingCost) -> MediaInfo:
    """Probe a file. Raises MediaError if it is of another modality."""
    info = _probe(source, cost)
    if info.modality != modality:
        raise MediaError(
            f"{name_of(source)}: expected {_WITH_ARTICLE[modality]}, got "
            f"{_WITH_ARTICLE[info.modality]} ({info.format}); give it as "
            f"{info.modality.capitalize()}(...)"
        )
    return info


def _check(info: MediaInfo, name: str) -> None:
    """Raise MediaError if a file is empty or exceeds the limits, according to its header."""
    if info.modality == "audio" and info.samples < 1:
        raise MediaError(f"{name}: the audio holds no samples (0 seconds)")
    if info.modality == "video" and info.frames < 1:
        raise MediaError(f"{name}: the video holds no frames")
    if info.modality != "audio":
        if not info.width or not info.height:
            raise MediaError(
                f"{name}: the size of its frames cannot be read; it is damaged, or they have more "
                f"than {current_limits().pixels} pixels (see `mmllm.media.limits`)"
            )
        check_size(name, info.width, info.height)
    if info.sample_rate > MAX_SAMPLE_RATE:
        raise MediaError(
            f"{name}: {info.sample_rate} samples per second, more than the {MAX_SAMPLE_RATE} that "
            "any recorder takes; is its header damaged?"
        )
    check_limit(name, "seconds", info.seconds, "seconds")
    check_limit(name, "frames", info.frames, "frames")
    check_limit(name, "decoded_bytes", info.decoded_bytes, "bytes when decoded")
