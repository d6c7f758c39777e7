"""Sounds: by soundfile, and by PyAV what soundfile cannot read (AAC, M4A, Opus in MP4 ...).

Legend: C channels, S samples.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmllm.conversation import Audio
from mmllm.errors import MediaError
from mmllm.media import provenance
from mmllm.media.facts import Facts

SUFFIXES = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS")}
_BLOCK = 1 << 16
"""Samples written at once: libsndfile's Vorbis encoder crashes on very long blocks."""


def probe(file: BinaryIO, name: str) -> Facts | None:
    """What the header says, or None when soundfile does not know the format."""
    import soundfile

    if str(getattr(file, "name", "")).lower().endswith(".raw"):
        return None  # soundfile believes this suffix and reads anything as samples
    try:
        with soundfile.SoundFile(file) as sound:
            facts = Facts(
                "audio",
                sound.format,
                seconds=sound.frames / sound.samplerate,
                samples=sound.frames,
                sample_rate=sound.samplerate,
                channels=sound.channels,
            )
    except soundfile.LibsndfileError as error:
        if "not recognised" in str(error) or "unknown format" in str(error).lower():
            return None
        raise _damaged(name, error) from error
    if facts.format in ("WAV", "WAVEX"):
        _check_wav(file, name)
    return facts


def decode(file: BinaryIO, name: str, facts: Facts) -> tuple[np.ndarray, dict[str, Any] | None]:
    """float32[C, S] in [-1, 1], and the provenance that the file carries."""
    import soundfile

    try:
        with soundfile.SoundFile(file) as sound:
            samples = sound.read(dtype="float32", always_2d=True)
            mark = provenance.from_comment(sound.comment)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise _damaged(name, error) from error
    # MP3 counts its frames by estimate; the other formats know.
    if len(samples) < facts.samples * (0.9 if facts.format == "MP3" else 1):
        raise _damaged(name, f"{facts.samples} samples announced, {len(samples)} found")
    return checked(samples.T, name), mark


def read_provenance(file: BinaryIO, name: str) -> dict[str, Any] | None:
    """The mark of a sound that soundfile can read."""
    import soundfile

    try:
        with soundfile.SoundFile(file) as sound:
            return provenance.from_comment(sound.comment)
    except soundfile.LibsndfileError as error:
        raise _damaged(name, error) from error


def checked(samples: np.ndarray, name: str) -> np.ndarray:
    """float32[C, S], contiguous, clipped to [-1, 1]; refuses silence of length zero and NaN."""
    if 0 in samples.shape:
        raise MediaError(f"{name}: the sound holds no samples")
    if not np.isfinite(samples).all():
        raise MediaError(f"{name}: the sound holds values that are not numbers (NaN or infinity)")
    return np.ascontiguousarray(samples.clip(-1.0, 1.0), dtype=np.float32)


def save(audio: Audio, path: Path, suffix: str) -> None:
    """Write WAV or FLAC (16 bit), or OGG Vorbis."""
    import soundfile

    audio = decoded(audio)
    samples = audio.to_numpy()
    assert audio.sample_rate
    kind, subtype = SUFFIXES[suffix]
    with soundfile.SoundFile(
        path, "w", audio.sample_rate, samples.shape[0], format=kind, subtype=subtype
    ) as sound:
        if audio.provenance is not None:
            sound.comment = provenance.to_comment(audio.provenance)
        for start in range(0, samples.shape[1], _BLOCK):
            sound.write(samples[:, start : start + _BLOCK].T)


def resample(audio: Audio, rate: int, mono: bool = True) -> Audio:
    """The same sound at `rate` Hz, its channels averaged into one if `mono`.

    Band-limited by a windowed sinc (`torchaudio.functional.resample`).
    """
    audio = decoded(audio)
    samples = audio.to_numpy()
    if mono and samples.shape[0] > 1:
        samples = samples.mean(axis=0, keepdims=True)
    if audio.sample_rate != rate:
        import torch
        from torchaudio.functional import resample as sinc

        assert audio.sample_rate
        # Zero-copy is not worth a read-only warning: decoded arrays may be shared.
        tensor = torch.tensor(samples)
        samples = sinc(tensor, audio.sample_rate, rate).clamp(-1, 1).numpy()
    return replace(audio, source=None, array=samples, sample_rate=rate)


def decoded(audio: Audio) -> Audio:
    """`Medium.decoded`, typed, with its rate checked."""
    audio = audio.decoded()  # type: ignore[assignment]
    if not audio.sample_rate or audio.sample_rate <= 0:
        raise MediaError(
            f"{audio!r}: expected a positive sample rate, got {audio.sample_rate}; pass "
            "sample_rate=..."
        )
    return audio


def _damaged(name: str, why: object) -> MediaError:
    why = getattr(why, "error_string", why)  # libsndfile's words, without the file object's repr
    return MediaError(
        f"{name}: the sound is damaged or truncated ({why}); was it copied completely?"
    )


def _check_wav(file: BinaryIO, name: str) -> None:
    """libsndfile reads a WAV whose end is missing without a word: compare what it announces."""
    file.seek(0, 2)
    length = file.tell()
    position = 12  # after "RIFF", the length and "WAVE"
    while position + 8 <= length:
        file.seek(position)
        chunk = file.read(8)
        size = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"data":
            # Recorders that stream leave the length open: 0 or all ones.
            if size not in (0, 0xFFFFFFFF) and position + 8 + size > length:
                found = length - position - 8
                raise _damaged(name, f"{size} bytes of samples announced, {found} found")
            return
        position += 8 + size + size % 2
