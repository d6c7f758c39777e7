"""Elements that all responses share: media files, ids, headers, server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmllm.conversation import Medium
from mmllm.inference.replies import Reply
from mmllm.server import markdown
from mmllm.server.settings import MediaFormat

MEDIA_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
}
"""File suffix -> media type."""
PART_TYPES = {"image": "image_url", "audio": "input_audio", "video": "video_url"}
"""Modality -> `type` of its part."""

_MAX_IGNORED = 32
"""Most dropped fields that a response names."""


def new_id(prefix: str) -> str:
    """Return a random identifier: `chatcmpl-…`."""
    return f"{prefix}{secrets.token_hex(12)}"


@dataclass(frozen=True)
class EncodedMedium:
    """A medium as a file.

    Attributes:
        modality: its modality.
        suffix: the file's: "png", "wav", …
        base64: the file's bytes.
        link: the medium in Markdown; empty where text shows no media.
    """

    modality: str
    suffix: str
    base64: str
    link: str

    @property
    def uri(self) -> str:
        """The file as a data URI."""
        return _data_uri(self.suffix, self.base64)

    @property
    def part(self) -> dict[str, Any]:
        """The medium as a part of a chat message."""
        kind = PART_TYPES[self.modality]
        if self.modality == "audio":
            return {"type": kind, kind: {"data": self.base64, "format": self.suffix}}
        return {"type": kind, kind: {"url": self.uri}}


@dataclass(frozen=True)
class MediumEncoder:
    """Encodes the media of one response, and links them where its text is to show them.

    Args:
        media_format: How text shows media.
        url_of: Keeps a file (bytes, suffix) and returns its URL.
        audio_format: Suffix of audio files: "wav", "flac" or "mp3".
    """

    media_format: MediaFormat
    url_of: Callable[[bytes, str], str]
    audio_format: str = "wav"

    async def encode(self, medium: Medium) -> EncodedMedium:
        """Encode one medium."""
        modality = medium.modality
        suffix = {"image": "png", "audio": self.audio_format, "video": "mp4"}[modality]
        file = await encode_medium(medium, suffix)
        data = base64.b64encode(file).decode("ascii")
        link = ""
        if self.media_format == "markdown":
            link = markdown.link(modality, _data_uri(suffix, data))
        elif self.media_format == "urls":
            link = markdown.link(modality, self.url_of(file, suffix))
        return EncodedMedium(modality, suffix, data, link)


def _data_uri(suffix: str, data: str) -> str:
    return f"data:{MEDIA_TYPES[suffix]};base64,{data}"


async def encode_medium(medium: Medium, suffix: str) -> bytes:
    """Encode a medium as the file that `Medium.save` writes, with its provenance mark.

    `suffix`: "png", "wav", …
    """

    def write() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return medium.save(Path(folder) / f"medium.{suffix}").read_bytes()

    return await asyncio.to_thread(write)


def reply_extras(replies: Sequence[Reply], ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The field `mmllm` of a response: seed, notes and timings of the first reply, and the fields
    that a lenient server dropped."""
    reply = replies[0]
    timings = reply.timings
    return {
        "seed": reply.seed,
        "notes": [note for entry in replies for note in entry.notes],
        "timings": {
            "first_token": timings.first_token,
            "text": timings.text,
            "total": timings.total,
            "media": dict(timings.media),
        },
        **ignored_fields(ignored),
    }


def ignored_fields(ignored: Sequence[str]) -> dict[str, Any]:
    """Return the fields that a lenient server dropped, as part of a JSON body; empty if none."""
    return {"ignored": list(ignored[:_MAX_IGNORED])} if ignored else {}


def ignored_header(ignored: Sequence[str], **more: str) -> dict[str, str]:
    """`more`, and the header that names the fields that a lenient server dropped."""
    names = ", ".join(quote(name, safe="") for name in ignored[:_MAX_IGNORED])
    return {**more, **({"x-mmllm-ignored": names} if names else {})}


def sse_event(data: Any, name: str | None = None) -> str:
    """One server-sent event, with the line `event: name` if there is a name."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"{f'event: {name}' + chr(10) if name else ''}data: {text}\n\n"
