"""Media as files, and as the parts of a request."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import Medium, Video
from tests.samples import picture, sound


def file_of(medium: Medium, suffix: str) -> bytes:
    """The bytes of the file that `Medium.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        return medium.save(Path(folder) / f"medium.{suffix}").read_bytes()


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
