"""A reply -> a response of the API: whole, or in the chunks of a stream."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmllm.conversation import Medium, Text
from mmllm.replies import (
    Done,
    Event,
    MediumReady,
    MediumStarted,
    Progress,
    Reply,
    TextDelta,
)
from mmllm.replies import Usage as Tokens
from mmllm.server import markdown
from mmllm.server.settings import MediaFormat

TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
}
"""Format (the suffix of its files) -> media type."""
PARTS = {"image": "image_url", "audio": "input_audio", "video": "video_url"}
"""Modality -> type of its part."""
_FINISH = {"end": "stop", "stop": "stop", "length": "length"}


def new_id(kind: str) -> str:
    """`chatcmpl-…`; nobody can guess it."""
    return f"{kind}{secrets.token_hex(12)}"


async def encode_medium(medium: Medium, suffix: str) -> bytes:
    """The file that `Medium.save` writes (`suffix`: "png"), with its provenance mark."""

    def write() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return medium.save(Path(folder) / f"medium.{suffix}").read_bytes()

    return await asyncio.to_thread(write)


@dataclass
class ChatResponseWriter:
    """Writes the response of a chat completion. `sounds`: the format of audio; `media_format`: how
    `content` shows media; `keep`: stores a file (bytes, suffix) and returns its URL."""

    model: str
    sounds: str = "wav"
    media_format: MediaFormat = "parts"
    keep: Callable[[bytes, str], str] | None = None
    ignored: Sequence[str] = ()
    id: str = field(default_factory=lambda: new_id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))
    num_images: int = 0
    has_audio: bool = False
    num_parts: int = 0

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The response that is not streamed."""
        parts, views = [], {"images": [], "audio": None}
        content, pieces = markdown.Content(), []
        for place, part in enumerate(reply.message.parts):
            if isinstance(part, Text):
                parts.append({"type": "text", "text": part.text})
                pieces.append(content.text(place, part.text))
                continue
            made, seen, link = await self._medium(part)
            pieces.append(content.medium(place, link))
            parts.append(made)
            views["images"] += seen.pop("images", [])
            views.update(seen)
        message = {
            "role": "assistant",
            "content": reply.text if self.media_format == "parts" else "".join(pieces),
            "refusal": None,
            "parts": parts,
            "images": views["images"] or None,
            "audio": views["audio"],
        }
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": _FINISH[reply.finish],
            "logprobs": None,
        }
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "usage": usage(reply.usage),
            "mmllm": reply_extras(reply, self.ignored),
        }

    async def chunks(
        self, events: AsyncIterator[Event], *, with_usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream as chunks; text and media bear the number of their part. Where
        `content` shows media, its text waits for those before it; `parts` never does."""
        content = markdown.Content()
        in_order = self.media_format != "parts"
        yield self._chunk({"role": "assistant", "content": ""})
        async for event in events:
            if isinstance(event, TextDelta):
                part = {"type": "text", "text": event.text}
                text = content.text(event.part_index, event.text) if in_order else event.text
                delta = {"content": text} if text else {}
                yield self._chunk({**delta, **self._parts(event.part_index, part)})
            elif isinstance(event, MediumStarted):
                content.started(event.part_index)
                part = {"type": PARTS[event.modality]}
                yield self._chunk(self._parts(event.part_index, part))
            elif isinstance(event, Progress):
                progress = {
                    "part": event.part_index,
                    "modality": event.modality,
                    "step": event.step,
                    "steps": event.steps,
                }
                yield self._chunk({}, mmllm={"progress": progress})
            elif isinstance(event, MediumReady):
                part, views, link = await self._medium(event.medium)
                text = content.medium(event.part_index, link) if in_order else ""
                delta = {"content": text} if text else {}
                yield self._chunk({**delta, **views, **self._parts(event.part_index, part)})
            elif isinstance(event, Done):
                reply = event.reply
                if rest := content.rest():
                    yield self._chunk({"content": rest})
                yield self._chunk(
                    {}, finish=_FINISH[reply.finish], mmllm=reply_extras(reply, self.ignored)
                )
                if with_usage:
                    yield {**self._chunk({}), "choices": [], "usage": usage(reply.usage)}

    async def _medium(self, medium: Medium) -> tuple[dict[str, Any], dict[str, Any], str]:
        """(its part, the views of it: images or audio, its link in Markdown)."""
        suffix = {"image": "png", "audio": self.sounds, "video": "mp4"}[medium.modality]
        file = await encode_medium(medium, suffix)
        data = base64.b64encode(file).decode("ascii")
        uri = f"data:{TYPES[suffix]};base64,{data}"
        link = ""
        if self.media_format == "markdown":
            link = markdown.link(medium.modality, uri)
        elif self.media_format == "urls" and self.keep is not None:
            link = markdown.link(medium.modality, self.keep(file, suffix))
        kind = PARTS[medium.modality]
        if medium.modality == "audio":
            part = {"type": kind, kind: {"data": data, "format": suffix}}
            if self.has_audio:
                return part, {}, link
            self.has_audio = True
            audio = {"id": new_id("audio_"), "data": data, "transcript": ""}
            return part, {"audio": {**audio, "expires_at": self.created}}, link
        part = {"type": kind, kind: {"url": uri}}
        if medium.modality != "image":
            return part, {}, link
        self.num_images += 1
        return part, {"images": [{"index": self.num_images - 1, **part}]}, link

    def _parts(self, place: int, part: Mapping[str, Any]) -> dict[str, Any]:
        """`delta.parts`: with every number before it, because clients add them up by number."""
        skipped = [
            {"index": number, "type": "text", "text": ""} for number in range(self.num_parts, place)
        ]
        self.num_parts = max(self.num_parts, place + 1)
        return {"parts": [*skipped, {"index": place, **part}]}

    def _chunk(
        self, delta: dict[str, Any], *, finish: str | None = None, **more: Any
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            **more,
        }


def usage(tokens: Tokens) -> dict[str, Any]:
    made = tokens.text + tokens.signals
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": made,
        "total_tokens": tokens.prompt + made,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
    }


def reply_extras(reply: Reply, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """What OpenAI's shapes have no place for."""
    timings = reply.timings
    return {
        "seed": reply.seed,
        "notes": list(reply.notes),
        "timings": {
            "first_token": timings.first_token,
            "text": timings.text,
            "total": timings.total,
            "media": dict(timings.media),
        },
        **ignored_fields(ignored),
    }


_MOST_NAMED = 32


def ignored_fields(ignored: Sequence[str]) -> dict[str, Any]:
    """What a lenient server dropped, as a field, if it dropped anything."""
    return {"ignored": list(ignored[:_MOST_NAMED])} if ignored else {}


def headers(ignored: Sequence[str], **more: str) -> dict[str, str]:
    """`more`, and what a lenient server dropped, in a header."""
    names = ", ".join(quote(name, safe="") for name in ignored[:_MOST_NAMED])
    return {**more, **({"x-mmllm-ignored": names} if names else {})}


def sse_event(data: Any) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
