"""Write replies as a chat completion: one JSON body, or the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmllm.conversation import Medium, Text, spaced
from mmllm.inference.events import Done, Event, MediumReady, MediumStarted, Progress, TextDelta
from mmllm.inference.replies import Reply
from mmllm.server import encoding, markdown
from mmllm.server.encoding import PART_TYPES, MediumEncoder

_FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length"}


@dataclass
class _MessageState:
    """The images and parts of one message so far, which number the next ones."""

    num_images: int = 0
    has_audio: bool = False
    num_parts: int = 0


@dataclass
class ChatResponseWriter:
    """Writes the response of a chat completion.

    Args:
        model: Its name.
        encoder: Encodes media; how `content` shows them.
        ignored: Fields that a lenient server dropped.
    """

    model: str
    encoder: MediumEncoder
    ignored: Sequence[str] = ()
    id: str = field(default_factory=lambda: encoding.new_id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))

    async def response(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The body of a response that is not streamed; one choice for each reply."""
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [await self._choice(index, reply) for index, reply in enumerate(replies)],
            "usage": usage(replies),
            "mmllm": encoding.reply_extras(replies, self.ignored),
        }

    async def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        state = _MessageState()
        parts: list[dict[str, Any]] = []
        images: list[dict[str, Any]] = []
        audio = None
        content, pieces = markdown.Content(), []
        for part_index, part in enumerate(reply.message.parts):
            if isinstance(part, Text):
                parts.append({"type": "text", "text": part.text})
                pieces.append(content.text(part_index, part.text))
                continue
            encoded, views, link = await self._medium(part, state)
            pieces.append(content.medium(part_index, link))
            parts.append(encoded)
            images += views.get("images", [])
            audio = views.get("audio", audio)
        message = {
            "role": "assistant",
            "content": reply.text if self.encoder.media_format == "parts" else "".join(pieces),
            "refusal": None,
            "parts": parts,
            "images": images or None,
            "audio": audio,
        }
        return {
            "index": index,
            "message": message,
            "finish_reason": _FINISH_REASONS[reply.finish],
            "logprobs": None,
        }

    async def chunks(
        self, events: AsyncIterator[Event], *, with_usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream; text and media bear the index of their part.

        Where `content` shows media, text waits for the media before it; `parts` never waits.
        """
        state = _MessageState()
        content = markdown.Content()
        in_order = self.encoder.media_format != "parts"
        before, place = "", -1  # the text that was written last, and its part
        yield self._chunk({"role": "assistant", "content": ""})
        async for event in events:
            if isinstance(event, TextDelta):
                part = {"type": "text", "text": event.text}
                if in_order:
                    text = content.text(event.part_index, event.text)
                else:
                    is_same = event.part_index == place
                    text = event.text if is_same else spaced(before, event.text)
                    before, place = text or before, event.part_index
                delta = {"content": text} if text else {}
                yield self._chunk({**delta, **_parts(event.part_index, part, state)})
            elif isinstance(event, MediumStarted):
                content.started(event.part_index)
                part = {"type": PART_TYPES[event.modality]}
                yield self._chunk(_parts(event.part_index, part, state))
            elif isinstance(event, Progress):
                progress = {
                    "part": event.part_index,
                    "modality": event.modality,
                    "step": event.step,
                    "steps": event.steps,
                }
                yield self._chunk({}, mmllm={"progress": progress})
            elif isinstance(event, MediumReady):
                part, views, link = await self._medium(event.medium, state)
                text = content.medium(event.part_index, link) if in_order else ""
                delta = {"content": text} if text else {}
                yield self._chunk({**delta, **views, **_parts(event.part_index, part, state)})
            elif isinstance(event, Done):
                if rest := content.rest():
                    yield self._chunk({"content": rest})
                yield self._chunk(
                    {},
                    finish=_FINISH_REASONS[event.reply.finish],
                    mmllm=encoding.reply_extras([event.reply], self.ignored),
                )
                if with_usage:
                    yield {**self._chunk({}), "choices": [], "usage": usage([event.reply])}

    async def _medium(
        self, medium: Medium, state: _MessageState
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        """(its part, its views `images` or `audio`, its Markdown link)."""
        encoded = await self.encoder.encode(medium)
        part = encoded.part
        views: dict[str, Any] = {}
        if medium.modality == "audio" and not state.has_audio:
            state.has_audio = True
            audio = {"id": encoding.new_id("audio_"), "data": encoded.base64, "transcript": ""}
            views = {"audio": {**audio, "expires_at": self.created}}
        elif medium.modality == "image":
            views = {"images": [{"index": state.num_images, **part}]}
            state.num_images += 1
        return part, views, encoded.link

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


def _parts(part_index: int, part: Mapping[str, Any], state: _MessageState) -> dict[str, Any]:
    """`delta.parts`, with every index before it too, because clients merge deltas by index."""
    skipped = [
        {"index": index, "type": "text", "text": ""} for index in range(state.num_parts, part_index)
    ]
    state.num_parts = max(state.num_parts, part_index + 1)
    return {"parts": [*skipped, {"index": part_index, **part}]}


def usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """Token counts of a completion; its choices share the prompt, which counts once."""
    prompt = replies[0].usage.prompt
    generated = sum(reply.usage.text + reply.usage.signals for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": replies[0].usage.cached},
    }
