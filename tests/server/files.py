"""Media as files, and as the parts of a request."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.media import read_provenance
from tests.test_rendering import picture, sound


def file_of(medium: Medium, suffix: str) -> bytes:
    """What `Medium.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        return medium.save(Path(folder) / f"medium.{suffix}").read_bytes()


def alike(found: Sequence[str | bytes], wanted: Sequence[str | bytes]) -> bool:
    """Texts and files in their order. Texts are equal; media are to 1e-4 before they are rounded,
    since what threads and addresses do to a sum is rounding: a level or two of what was written,
    more where a clip was compressed."""
    return len(found) == len(wanted) and all(map(_alike, found, wanted))


def _alike(found: str | bytes, wanted: str | bytes) -> bool:
    if isinstance(found, str) or isinstance(wanted, str) or found == wanted:
        return found == wanted
    if read_provenance(found) != read_provenance(wanted):
        return False
    kind, most = _kind(wanted)
    one, other = (kind(data).decoded().to_numpy().astype(float) for data in (found, wanted))
    return _kind(found)[0] is kind and one.shape == other.shape and abs(one - other).max() <= most


def _kind(data: bytes) -> tuple[type[Medium], float]:
    """What the bytes of a file are, and how far values may be apart."""
    if data[4:8] == b"ftyp":
        return Video, 8
    return (Audio, 2e-4) if data[8:12] == b"WAVE" or data[:4] == b"fLaC" else (Image, 2)


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PNG = file_of(picture(40), "png")
WAV = file_of(sound(0.25), "wav")
MOVING = np.stack([np.full((16, 16, 3), 60 * frame, np.uint8) for frame in range(4)])
MP4 = file_of(Video.from_numpy(MOVING, 4.0), "mp4")

TEXT: dict[str, Any] = {"type": "text", "text": "what is this? one two three four"}
IMAGE: dict[str, Any] = {
    "type": "image_url",
    "image_url": {"url": data_uri(PNG, "image/png"), "detail": "high"},
}
AUDIO: dict[str, Any] = {
    "type": "input_audio",
    "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"},
}
VIDEO: dict[str, Any] = {
    "type": "video_url",
    "video_url": {"url": data_uri(MP4, "video/mp4")},
}
