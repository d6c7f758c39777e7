"""Media as files and arrays: decode, check, resample and save pictures, sounds and clips.

    probe(source) -> MediaInfo              what a file is, by its header
    decode(medium) -> Medium            the same medium with its array, within the limits
    sample_frames(video, 5)             a few frames of a clip, however long it is
    resample(audio, 16000)              another rate
    save(medium, path) -> Path          all or nothing, with its provenance mark
    read_provenance(path)               what made this file, if mmllm did
    with limits(seconds=30): ...        other limits

Only numpy is imported before a file is opened. Legend: H x W pixels, F frames, C channels,
S samples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmllm.conversation import HIGHEST_RATE, MEDIA, Audio, Image, Medium, Video
from mmllm.errors import MediaError
from mmllm.media import audio as _audio
from mmllm.media import image as _image
from mmllm.media import video as _video
from mmllm.media.audio import resample
from mmllm.media.files import MediaSource, name_of, opened, replacing
from mmllm.media.info import MediaInfo
from mmllm.media.limits import DecodingCost, Limits, check_limit, check_size, current_limits, limits

__all__ = [
    "Limits",
    "MediaInfo",
    "SampledVideo",
    "current_limits",
    "decode",
    "limits",
    "probe",
    "read_provenance",
    "resample",
    "sample_frames",
    "save",
]

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Medium)

_CALLED = {"image": "a picture", "audio": "a sound", "video": "a clip"}
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": tuple(_image.SUFFIXES),
    "audio": tuple(_audio.SUFFIXES),
    "video": _video.SUFFIXES,
}


@dataclass(frozen=True, eq=False, repr=False)
class SampledVideo(Video):
    """A clip some of whose frames were read before: `sampled` holds what `sample_frames` gives, by
    the number that is asked for."""

    sampled: Mapping[int, np.ndarray] = field(default_factory=dict)


def probe(source: MediaSource) -> MediaInfo:
    """What a file is, by its header; nothing is decoded.

    Raises:
        MediaError: missing, empty, too many bytes, or neither picture, sound nor clip.
    """
    return _probe(source, DecodingCost(name_of(source)))


def _probe(source: MediaSource, cost: DecodingCost) -> MediaInfo:
    name = name_of(source)
    for room in (_image, _audio, _video):
        with opened(source) as file:
            facts = room.probe(file, name, cost)
        if facts is not None:
            return facts
    raise MediaError(
        f"{name}: neither a picture, a sound nor a clip in a format that is known (or one damaged "
        "from its first bytes on); convert it to PNG, WAV or MP4"
    )


def decode(medium: M) -> M:
    """The medium with its `array` filled: the class, the caption and the source stay.

    Image: uint8[H, W, 3], upright by EXIF, on white where it is transparent. Audio: float32[C, S]
    in [-1, 1] at its own `sample_rate`. Video: uint8[F, H, W, 3] at a steady `fps` (a frame that
    stays longer is repeated), with its `audio`. A provenance mark in the file is kept.

    Raises:
        MediaError: missing, empty, damaged, of another modality, or beyond `limits`; sizes are
            compared with the header, before anything is decoded, time and work while decoding.
    """
    if medium.array is not None:
        return medium
    source = _source(medium)
    cost = DecodingCost(name_of(source))
    facts = _probed(medium, source, cost)
    _check(facts, name_of(source))
    fields = _DECODERS[medium.modality](source, facts, cost)
    if medium.provenance is not None:
        fields["provenance"] = medium.provenance
    return replace(medium, **fields)


def sample_frames(video: Video, num: int) -> np.ndarray:
    """uint8[num, H, W, 3]: the middles of `num` equal parts of a clip, even in time.

    A clip of fewer frames repeats them. A clip in a file is read frame by frame, so one that is
    too long to be decoded whole (`Limits.decoded_bytes`) can still be looked at.

    Raises:
        MediaError: as `decode`.
    """
    if num < 1:
        raise ValueError(f"sample_frames: expected num >= 1, got {num}")
    if video.array is not None:
        count = len(video.array)
        return video.array[[int((i + 0.5) * count / num) for i in range(num)]]
    if isinstance(video, SampledVideo) and num in video.sampled:
        return video.sampled[num]
    source = _source(video)
    cost = DecodingCost(name_of(source))
    facts = _probed(video, source, cost)
    _check(replace(facts, frames=num, samples=0), name_of(source))
    _check(replace(facts, width=1, height=1, samples=0), name_of(source))
    return _read_frames(source, facts, num, cost)[0]


def save(medium: Medium, path: str | Path) -> Path:
    """Write a medium in the format of the suffix, all or nothing, and return the path.

    Image: .png .webp .jpg; Audio: .wav .flac .ogg .mp3; Video: .mp4 (with its sound) .webp .gif.
    A `provenance` is written into the file. Missing folders are made.

    Raises:
        MediaError: an unknown suffix, a medium without data, a full disk.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise MediaError(f"{path}: cannot be written ({error})") from error
    suffix, known = path.suffix.lower(), _SUFFIXES[medium.modality]
    if suffix not in known:
        raise MediaError(
            f"{path}: {_CALLED[medium.modality]} is saved as {', '.join(known)}; got "
            f"{path.suffix or 'no suffix'!r}"
        )
    medium = decode(medium)
    with replacing(path) as temporary:
        if isinstance(medium, Image):
            _image.save(medium, temporary, suffix)
        elif isinstance(medium, Audio):
            _audio.save(medium, temporary, suffix)
        elif isinstance(medium, Video):
            _save_video(medium, temporary, path)
    return path


def read_provenance(path: MediaSource) -> dict[str, Any] | None:
    """What mmllm wrote into the file about its making, or None.

    Raises:
        MediaError: as `probe`.
    """
    name = name_of(path)
    cost = DecodingCost(name)
    facts = _probe(path, cost)
    room = _video if facts.by_av else _audio if facts.modality == "audio" else _image
    with opened(path) as file:
        return room.read_provenance(file, name, cost)


# --- each modality's way ------------------------------------------------------------------------


def _decode_image(source: MediaSource, facts: MediaInfo, cost: DecodingCost) -> dict[str, Any]:
    with opened(source) as file:
        array, mark = _image.decode(file, name_of(source), cost)
    return {"array": array, "provenance": mark}


def _decode_audio(source: MediaSource, facts: MediaInfo, cost: DecodingCost) -> dict[str, Any]:
    name = name_of(source)
    with opened(source) as file:
        if facts.by_av:
            sound = _video.read_sound(file, name, facts, cost)
            array, mark, rate = sound.array, sound.provenance, sound.sample_rate
        else:
            (array, mark), rate = _audio.decode(file, name, facts, cost), facts.sample_rate
    return {"array": array, "sample_rate": rate, "provenance": mark}


def _decode_video(source: MediaSource, facts: MediaInfo, cost: DecodingCost) -> dict[str, Any]:
    name = name_of(source)
    array, fps = _read_frames(source, facts, None, cost)
    fields: dict[str, Any] = {"array": array, "fps": fps}
    if facts.channels:
        with opened(source) as file:
            sound = _video.read_sound(file, name, facts, cost)
            fields["audio"] = replace(sound, provenance=None)
    room = _video if facts.by_av else _image
    with opened(source) as file:
        fields["provenance"] = room.read_provenance(file, name, cost)
    return fields


_DECODERS = {"image": _decode_image, "audio": _decode_audio, "video": _decode_video}


def _read_frames(
    source: MediaSource, facts: MediaInfo, num: int | None, cost: DecodingCost
) -> tuple[np.ndarray, float]:
    """(uint8[num, H, W, 3] even in time, frames per second); all frames if `num` is None."""
    name = name_of(source)
    if facts.by_av:
        times = _video.middles(num or facts.frames, facts.seconds)
        with opened(source) as file:
            array = _video.frames_at(file, name, facts, times, cost)
        return array, facts.frames / facts.seconds
    with opened(source) as file:
        stays = _image.durations(file, name, facts.frames, cost)
    fps, seconds = _image.frame_rate(stays), sum(stays) / 1000
    facts = replace(facts, seconds=seconds, frames=round(seconds * fps))
    _check(facts if num is None else replace(facts, width=1, height=1), name)
    times = _video.middles(num or facts.frames, facts.seconds)
    with opened(source) as file:
        return _image.frames_at(file, name, stays, times, cost), fps


def _save_video(video: Video, temporary: Path, path: Path) -> None:
    if not video.fps or video.fps <= 0:
        raise MediaError(f"{path}: expected a positive frame rate, got {video.fps}; pass fps=...")
    if temporary.suffix.lower() == ".mp4":
        _video.save_mp4(video, temporary)
        return
    if video.audio is not None:
        log.warning("%s: this format holds no sound; .mp4 keeps it", path)
    _image.save_animation(video, temporary, temporary.suffix.lower())


# --- checks -------------------------------------------------------------------------------------


def _source(medium: Medium) -> MediaSource:
    if medium.source is None:
        raise MediaError(
            f"{medium!r}: there is nothing to decode; give {type(medium).__name__}(...) a path or "
            "the bytes of a file"
        )
    return medium.source


def _probed(medium: Medium, source: MediaSource, cost: DecodingCost) -> MediaInfo:
    """The facts of a medium's file, which must be of the medium's modality."""
    facts = _probe(source, cost)
    if facts.modality != medium.modality:
        raise MediaError(
            f"{name_of(source)}: expected {_CALLED[medium.modality]}, got "
            f"{_CALLED[facts.modality]} ({facts.format}); give it as "
            f"{MEDIA[facts.modality].__name__}(...)"
        )
    return facts


def _check(facts: MediaInfo, name: str) -> None:
    """Emptiness and limits, by the header."""
    if facts.modality == "audio" and facts.samples < 1:
        raise MediaError(f"{name}: the sound holds no samples (0 seconds)")
    if facts.modality == "video" and facts.frames < 1:
        raise MediaError(f"{name}: the clip holds no frames")
    if facts.modality != "audio":
        if not facts.width or not facts.height:
            raise MediaError(
                f"{name}: the size of its frames cannot be read; it is damaged, or they have more "
                f"than {current_limits().pixels} pixels (see `mmllm.media.limits`)"
            )
        check_size(name, facts.width, facts.height)
    if facts.sample_rate > HIGHEST_RATE:
        raise MediaError(
            f"{name}: {facts.sample_rate} samples per second, more than the {HIGHEST_RATE} that "
            "any recorder takes; is its header damaged?"
        )
    check_limit(name, "seconds", facts.seconds, "seconds")
    check_limit(name, "frames", facts.frames, "frames")
    check_limit(name, "decoded_bytes", facts.decoded_bytes, "bytes when decoded")
