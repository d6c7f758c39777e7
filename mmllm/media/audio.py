"""Audio files read and written by soundfile. Other formats (AAC, M4A, Opus in MP4 ...) are read by
PyAV, see mmllm.media.audio_track.

Legend: C channels, S samples.
"""

from __future__ import annotations

from contextlib import suppress
from math import ceil, gcd
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmllm.errors import MediaError
from mmllm.media import provenance
from mmllm.media.files import brief
from mmllm.media.info import MediaContent, MediaInfo
from mmllm.media.limits import DecodingCost, check_limit

SUFFIXES = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
"""The sample rates that MPEG audio supports, in Hz."""
_BLOCK = 1 << 16
"""Samples read or written at once: libsndfile's Vorbis encoder crashes on very long blocks."""
_LARGEST_KERNEL = 1 << 24
"""Maximum number of values in a sinc kernel; for coprime rates it would take gigabytes."""
_SINC_ZEROS = 6
"""Zero crossings of the sinc on either side: torchaudio's default."""
RESAMPLE_BLOCK = 1 << 22
"""Samples per channel that are resampled at once: torch needs a multiple of their memory."""
_UNKNOWN = 1 << 40
"""A length in samples or bytes that no file has: headers contain it if the length is unknown."""
_OPEN = 0x7FFF0000
"""Minimum length in the header of a WAV whose writer did not know the length: SoX writes
0x7FFFF000, others the largest number of 31 or 32 bits, less the header."""


class SoundfileInput:
    """A file adapter for soundfile.

    It has no name, since soundfile trusts the suffix `.raw` and would read any file as samples. An
    invalid `seek` keeps the position, since an exception inside a callback of libsndfile would be
    printed and lost.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._seek, self.readinto = file.seek, file.readinto  # type: ignore[attr-defined]
        self.tell, self.read = file.tell, file.read

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position; an invalid one changes nothing.

        Args:
            offset: bytes from the place that `whence` names.
            whence: as in `io`: 0 the beginning, 1 the current position, 2 the end.

        Returns:
            The position, in bytes from the beginning.
        """
        with suppress(OSError, ValueError):
            self._seek(offset, whence)
        return self.tell()


def _soundfile_input(file: BinaryIO) -> Any:
    """Wrap a file; typed as Any, since soundfile's annotations accept fewer types than it does."""
    return SoundfileInput(file)


def probe(file: BinaryIO, name: str, cost: DecodingCost) -> MediaInfo | None:
    """Read the header of an audio file with soundfile.

    Args:
        file: the open file, at its beginning.
        name: its name in messages.
        cost: unused; the probes of all formats have this signature.

    Returns:
        Format, duration, samples, sample rate and channels; None if soundfile cannot read the file,
        or cannot tell its length, so that FFmpeg must read it.

    Raises:
        MediaError: the file is shorter than its header says.
    """
    import soundfile

    try:
        with soundfile.SoundFile(_soundfile_input(file)) as sound:
            facts = MediaInfo(
                "audio",
                sound.format,
                seconds=sound.frames / sound.samplerate,
                samples=sound.frames,
                sample_rate=sound.samplerate,
                channels=sound.channels,
            )
            compressed = sound.subtype.startswith("MPEG") and sound.format != "MP3"
    except Exception:  # soundfile's own classes, and others for malformed headers
        return None
    if compressed:
        return None  # MP3 in another container: soundfile only estimates the number of samples
    if facts.format == "VOC":
        return None  # soundfile reads block headers as samples
    if facts.format in ("WAV", "WAVEX"):
        return None if _is_open(file, name) and not facts.samples else facts
    if not 0 < facts.samples < _UNKNOWN:
        return None  # a stream of unknown length (FLAC, AU, CAF): FFmpeg reads it to its end
    _check_length(file, name, facts.format)
    return facts


def decode(
    file: BinaryIO, name: str, facts: MediaInfo, cost: DecodingCost
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Decode an audio file with soundfile.

    Args:
        file: the open file, at its beginning.
        name: its name in messages.
        facts: what `probe` returned for it.
        cost: checked after every block of 65,536 samples.

    Returns:
        The samples, float32[C, S] in [-1, 1], and the provenance metadata or None.

    Raises:
        MediaError: the file is damaged or truncated, or holds no samples, NaN or infinity.
        OversizedMediaError: decoding takes too long.
    """
    import soundfile

    array, length = np.empty((facts.channels, facts.samples), np.float32), 0
    try:
        with soundfile.SoundFile(_soundfile_input(file)) as sound:
            # In blocks: some codecs fail for all at once, and the cost is checked in between.
            while length < facts.samples:
                cost.check()
                wanted = min(_BLOCK, facts.samples - length)
                block = sound.read(wanted, dtype="float32", always_2d=True)
                if not len(block):
                    break
                array[:, length : length + len(block)] = block.T
                length += len(block)
            mark = provenance.from_comment(sound.comment)
    except MediaError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error
    # The length of an MP3 is an estimate; that of other formats is exact.
    if length < facts.samples * (0.9 if facts.format == "MP3" else 1):
        raise _damaged(name, f"{facts.samples} samples announced, {length} found")
    return checked(array[:, :length], name), mark


def read_provenance(file: BinaryIO, name: str, cost: DecodingCost) -> dict[str, Any] | None:
    """Read the provenance metadata of an audio file from its comment.

    Args:
        file: the open file, at its beginning.
        name: its name in messages.
        cost: unused; the readers of all formats have this signature.

    Returns:
        The metadata that `provenance.to_comment` wrote; None if there is none.

    Raises:
        MediaError: the file is damaged.
    """
    import soundfile

    try:
        with soundfile.SoundFile(_soundfile_input(file)) as sound:
            return provenance.from_comment(sound.comment)
    except Exception as error:
        raise _damaged(name, error) from error


def checked(samples: np.ndarray, name: str) -> np.ndarray:
    """Clip samples to [-1, 1], in place.

    Args:
        samples: float32[C, S], overwritten.
        name: the medium's name in messages.

    Raises:
        MediaError: there are no samples, or some are NaN or infinite.
    """
    if 0 in samples.shape:
        raise MediaError(f"{name}: the audio holds no samples")
    if not np.isfinite([samples.min(), samples.max()]).all():
        raise MediaError(f"{name}: the audio holds values that are not numbers (NaN or infinity)")
    return samples.clip(-1.0, 1.0, out=samples)


def save(content: MediaContent, path: Path, suffix: str) -> None:
    """Write audio as WAV or FLAC (16 bit), OGG Vorbis, or MP3 (resampled to a supported rate).

    Args:
        content: the audio.
        path: the file to write.
        suffix: a key of SUFFIXES.

    Raises:
        MediaError: MP3 cannot hold as many channels.
    """
    import soundfile

    samples, rate = content.array, content.sample_rate
    assert rate
    if suffix == ".mp3" and samples.shape[0] > 2:
        raise MediaError(
            f"{path.name}: MP3 holds at most 2 channels, got {samples.shape[0]}: save it as .flac"
        )
    if suffix == ".mp3" and rate not in _MP3_RATES:
        above = (supported for supported in _MP3_RATES if supported > rate)
        supported = next(above, _MP3_RATES[-1])
        samples, rate = resample(samples, rate, supported, name=path.name), supported
    kind, subtype = SUFFIXES[suffix]
    with soundfile.SoundFile(
        path, "w", rate, samples.shape[0], format=kind, subtype=subtype
    ) as sound:
        if content.provenance is not None:
            sound.comment = provenance.to_comment(content.provenance)
        for start in range(0, samples.shape[1], _BLOCK):
            sound.write(samples[:, start : start + _BLOCK].T)


def resample(
    samples: np.ndarray, own: int, rate: int, *, mono: bool = False, name: str = "audio"
) -> np.ndarray:
    """Resample audio: float32[C, S] -> float32[C, S'], or float32[1, S'] if `mono`.

    Band-limited by a windowed sinc (`torchaudio.functional.resample`), also under autocast.

    Args:
        samples: float32[C, S] in [-1, 1].
        own: their sample rate in Hz.
        rate: the new sample rate in Hz.
        mono: whether to average the channels first.
        name: the audio's name in messages.

    Raises:
        OversizedMediaError: the result is larger than `Limits.decoded_bytes`.
    """
    if mono and samples.shape[0] > 1:
        samples = samples.mean(axis=0, keepdims=True)
    if own == rate:
        return samples
    size = 4 * samples.shape[0] * samples.shape[1] * rate // own
    check_limit(name, "decoded_bytes", size, f"bytes when resampled to {rate} Hz")
    common = gcd(own, rate)
    exact = own // common * (rate // common) <= _LARGEST_KERNEL
    return (_sinc if exact else _by_phases)(samples, own, rate)


def _sinc(samples: np.ndarray, own: int, rate: int) -> np.ndarray:
    """Resample float32[C, S] by torchaudio, whose kernel grows with the reduced rates.

    Long audio is resampled in blocks, each with a margin as wide as the kernel.
    """
    import torch
    from torchaudio.functional import resample as sinc

    step, made = own // gcd(own, rate), rate // gcd(own, rate)
    reach = ceil(_SINC_ZEROS * step / (0.99 * min(step, made))) + step  # as in torchaudio
    margin, block = step * ceil(reach / step), step * ceil(RESAMPLE_BLOCK / step)
    channels, length = samples.shape
    resampled = np.empty((channels, -(-length * made // step)), np.float32)
    for start in range(0, length, block):
        left = min(start, margin)
        # A copy: torch warns about zero-copy views of read-only arrays.
        tensor = torch.tensor(samples[:, start - left : start + block + margin])
        with torch.autocast("cpu", enabled=False):
            part = sinc(tensor, own, rate).clamp(-1, 1).numpy()
        skipped, first = left * made // step, start * made // step
        part = part[:, skipped : skipped + block * made // step]
        resampled[:, first : first + part.shape[1]] = part[:, : resampled.shape[1] - first]
    return resampled


def _by_phases(samples: np.ndarray, own: int, rate: int) -> np.ndarray:
    """Resample float32[C, S] at any ratio of rates by FFmpeg's polyphase filter bank."""
    import av

    length = -(-samples.shape[1] * rate // own)
    resampled = np.zeros((samples.shape[0], length), np.float32)
    for row, channel in zip(resampled, samples, strict=True):
        resampler, done = av.AudioResampler(format="fltp", layout="mono", rate=rate), 0
        for start in [*range(0, len(channel), _BLOCK), None]:
            frame = None
            if start is not None:
                block = np.ascontiguousarray(channel[None, start : start + _BLOCK])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.sample_rate = own
            for made in resampler.resample(frame):
                part = made.to_ndarray()[0, : length - done]
                row[done : done + len(part)] = part
                done += len(part)
    return resampled.clip(-1, 1, out=resampled)


def _damaged(name: str, why: object) -> MediaError:
    why = getattr(why, "error_string", why)  # libsndfile's message, without the file object's repr
    return MediaError(
        f"{name}: the audio is damaged or truncated ({brief(why)}); was it copied completely?"
    )


def _check_length(file: BinaryIO, name: str, kind: str) -> None:
    """Raise MediaError if a file is shorter than its header says, which libsndfile ignores."""
    length = file.seek(0, 2)
    file.seek(0)
    head = file.read(28)
    if kind == "AIFF":
        announced, largest = 8 + int.from_bytes(head[4:8], "big"), _OPEN
    elif kind == "AU" and head[:4] == b".snd":
        announced = int.from_bytes(head[4:8], "big") + int.from_bytes(head[8:12], "big")
        largest = _OPEN
    elif kind == "RF64":
        announced, largest = 8 + int.from_bytes(head[20:28], "little"), _UNKNOWN
    elif kind == "W64":
        announced, largest = int.from_bytes(head[16:24], "little"), _UNKNOWN
    else:
        return
    if length < announced - 1 and announced < largest:  # the last byte may be padding
        raise _damaged(name, f"{announced} bytes announced, {length} found")


def _is_open(file: BinaryIO, name: str) -> bool:
    """Return whether a WAV does not state the length of its samples, as streaming recorders do.

    Raises MediaError if samples are missing: libsndfile reads such a file without an error.
    """
    file.seek(0, 2)
    length = file.tell()
    file.seek(0)
    head = file.read(8)
    order = "big" if head[:4] == b"RIFX" else "little"
    whole = int.from_bytes(head[4:], order)
    position = 12  # after "RIFF", the length and "WAVE"
    while position + 8 <= length:
        file.seek(position)
        chunk = file.read(8)
        size = int.from_bytes(chunk[4:], order)
        if chunk[:4] == b"data":
            found = length - position - 8
            if size == 0 or size >= _OPEN or (size > found and (whole == 0 or whole >= _OPEN)):
                return found > 0
            if size > found:
                raise _damaged(name, f"{size} bytes of samples announced, {found} found")
            return False
        position += 8 + size + size % 2
    return False
