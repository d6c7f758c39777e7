"""Elements that all responses share: media files, ids, headers, server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmllm.conversation import Medium
from mmllm.inference.replies import Reply

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

_MAX_IGNORED = 32
"""Most dropped fields that a response names."""


def new_id(prefix: str) -> str:
    """Return a random identifier: `chatcmpl-…`."""
    return f"{prefix}{secrets.token_hex(12)}"


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
