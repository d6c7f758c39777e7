"""Files -> arrays and back, for every modality: probe, decode, sample frames, save.

A file is probed by its header first and compared with the limits; only then is it decoded.
Legend: H x W pixels, F frames, C channels, S samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.errors import MediaError
from mmllm.media import audio, audio_track, container, image, mp4, video
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
    """Return what a file is, by its header; nothing is decoded.

    Raises:
        MediaError: missing, empty, too many bytes, or neither image, audio nor video.
    """
    return _probe(source, DecodingCost(name_of(source)))


def decode(source: MediaSource, modality: str) -> MediaContent:
    """Decode a file.

    Images are upright by EXIF and on white where they are transparent. Audio keeps its own sample
    rate. Videos have a steady frame rate (a frame that stays longer is repeated) and their audio
    track.

    Args:
        source: a path, the bytes of a file, or a file inside another.
        modality: what the file must be: "image", "audio" or "video".

    Raises:
        MediaError: missing, empty, damaged, of another modality, or beyond `limits`; sizes are
            compared with the header before anything is decoded, time and work while decoding.
    """
    cost = DecodingCost(name_of(source))
    info = _probe_as(source, modality, cost)
    _check(info, name_of(source))
    return DECODERS[modality](source, info, cost)


def sample_frames(source: MediaSource, num: int) -> np.ndarray:
    """Decode `num` frames of a video file, the middles of `num` equal parts: uint8[num, H, W, 3].

    The file is read frame by frame, so that a video that is too long to be decoded whole
    (`Limits.decoded_bytes`) can still be sampled. A video of fewer frames repeats them.

    Raises:
        MediaError: as `decode`.
    """
    cost = DecodingCost(name_of(source))
    info = _probe_as(source, "video", cost)
    _check(replace(info, frames=num, samples=0), name_of(source))
    _check(replace(info, width=1, height=1, samples=0), name_of(source))
    return _read_frames(source, info, num, cost)[0]


def output_path(path: str | Path, modality: str) -> Path:
    """Return the path of a file to be written, with its home folder expanded. Raises MediaError
    for a suffix in which this modality cannot be written."""
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise MediaError(f"{path}: cannot be written ({error})") from error
    known = SUFFIXES[modality]
    if path.suffix.lower() not in known:
        raise MediaError(
            f"{path}: {_WITH_ARTICLE[modality]} is saved as {', '.join(known)}; got "
            f"{path.suffix or 'no suffix'!r}"
        )
    return path


def save(content: MediaContent, modality: str, path: str | Path) -> Path:
    """Write decoded media in the format of the suffix, completely or not at all.

    Image: .png .webp .jpg; audio: .wav .flac .ogg .mp3; video: .mp4 (with its audio) .webp .gif.
    `content.provenance` is written into the file. Missing folders are made.

    Returns:
        The path.

    Raises:
        MediaError: an unknown suffix, or the disk is full.
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
    """Return what mmllm wrote into a file about how it was made, or None.

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
    "audio": _decode_audio,
    "video": _decode_video,
}


def _read_frames(
    source: MediaSource, info: MediaInfo, num: int | None, cost: DecodingCost
) -> tuple[np.ndarray, float]:
    """(uint8[num, H, W, 3] even in time, frames per second); all frames if `num` is None."""
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
    if suffix == ".mp4":
        mp4.save(content, temporary)
        return
    if content.audio is not None:
        log.warning("%s: this format holds no audio; .mp4 keeps it", path)
    image.save_animation(content, temporary, suffix)


# --- checks -------------------------------------------------------------------------------------


def _probe(source: MediaSource, cost: DecodingCost) -> MediaInfo:
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
    """The header of a file that must be of this modality."""
    info = _probe(source, cost)
    if info.modality != modality:
        raise MediaError(
            f"{name_of(source)}: expected {_WITH_ARTICLE[modality]}, got "
            f"{_WITH_ARTICLE[info.modality]} ({info.format}); give it as "
            f"{info.modality.capitalize()}(...)"
        )
    return info


def _check(info: MediaInfo, name: str) -> None:
    """Raise MediaError for an empty file, or one beyond the limits, by its header."""
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
