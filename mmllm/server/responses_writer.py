"""A reply -> a response of the Responses API: one JSON body, or the events of a stream.

Each part of a reply is an output item: a text is a message, an image an `image_generation_call`.
Audio and video, which that API has no items for, are in `mmllm.media`, in the shapes of a chat's
parts. Where `media_format` asks for it, a message with a Markdown link follows each medium.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmllm.conversation import Medium, Text, spaced
from mmllm.inference.events import Done, Event, MediumReady, MediumStarted, Progress, TextDelta
from mmllm.inference.replies import Reply
from mmllm.server import encoding, markdown
from mmllm.server.encoding import MediumEncoder
from mmllm.server.responses_schemas import ResponsesRequest


@dataclass
class ResponsesWriter:
    """Writes one response.

    Args:
        model: Its name.
        request: Its options are repeated in the response.
        encoder: Encodes media; how text shows them.
    """

    model: str
    request: ResponsesRequest
    encoder: MediumEncoder
    id: str = field(default_factory=lambda: encoding.new_id("resp_"))
    created: int = field(default_factory=lambda: int(time.time()))

    async def response(self, reply: Reply) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        output: list[dict[str, Any]] = []
        media: list[dict[str, Any]] = []
        before = ""  # the text of the message before
        for part in reply.message.parts:
            if isinstance(part, Text):
                output.append(_message(encoding.new_id("msg_"), spaced(before, part.text)))
                before = part.text or before
                continue
            item, medium, link = await self._medium(part, encoding.new_id("ig_"))
            output += [item] if item else []
            media += [medium] if medium else []
            output += [_message(encoding.new_id("msg_"), link)] if link else []
        return self._finished(reply, output, media)

    async def events(self, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream, numbered."""
        number = 0
        async for event in self._events(events):
            yield {**event, "sequence_number": number}
            number += 1

    async def _events(self, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, Any]]:
        output: list[dict[str, Any]] = []
        media: list[dict[str, Any]] = []
        index_of: dict[int, int] = {}
        """Part -> its place in `output`."""
        text_part: int | None = None  # the part of the text that is being written
        before = ""  # the text that was written last

        def add(part_index: int, item: dict[str, Any]) -> dict[str, Any]:
            index_of[part_index] = len(output)
            output.append(item)
            return {"output_index": len(output) - 1, "item_id": item["id"]}

        def end_text() -> Iterator[dict[str, Any]]:
            nonlocal text_part
            if text_part is not None:
                yield from _end_of_text(output[index_of[text_part]], index_of[text_part])
                text_part = None

        yield {"type": "response.created", "response": self._started()}
        yield {"type": "response.in_progress", "response": self._started()}
        async for event in events:
            if isinstance(event, TextDelta):
                delta = event.text
                if event.part_index not in index_of:
                    delta = spaced(before, delta)
                    for ending in end_text():
                        yield ending
                    place = add(event.part_index, _message(encoding.new_id("msg_"), ""))
                    for beginning in _begin_of_text(output[-1], place):
                        yield beginning
                    text_part = event.part_index
                index = index_of[event.part_index]
                item = output[index]
                item["content"][0]["text"] += delta
                before = delta or before
                yield {
                    "type": "response.output_text.delta",
                    "item_id": item["id"],
                    "output_index": index,
                    "content_index": 0,
                    "delta": delta,
                    "logprobs": [],
                }
            elif isinstance(event, MediumStarted):
                for ending in end_text():
                    yield ending
                if event.modality == "image":
                    item = {**_image(encoding.new_id("ig_"), None), "status": "in_progress"}
                    place = add(event.part_index, item)
                    yield _item_event("added", item, place["output_index"])
                    yield {"type": "response.image_generation_call.in_progress", **place}
            elif isinstance(event, Progress) and event.part_index in index_of:
                index = index_of[event.part_index]
                place = {"output_index": index, "item_id": output[index]["id"]}
                yield {"type": "response.image_generation_call.generating", **place}
            elif isinstance(event, MediumReady):
                index = index_of.get(event.part_index)
                name = encoding.new_id("ig_") if index is None else output[index]["id"]
                item, medium, link = await self._medium(event.medium, name)
                media += [medium] if medium else []
                if item and index is not None:
                    output[index] = item
                    place = {"output_index": index, "item_id": name}
                    yield {"type": "response.image_generation_call.completed", **place}
                    yield _item_event("done", item, index)
                if link:
                    message = _message(encoding.new_id("msg_"), link)
                    output.append(message)
                    place = {"output_index": len(output) - 1, "item_id": message["id"]}
                    for entry in (*_begin_of_text(message, place), _delta(place, link)):
                        yield entry
                    for ending in _end_of_text(message, place["output_index"]):
                        yield ending
            elif isinstance(event, Done):
                for ending in end_text():
                    yield ending
                response = self._finished(event.reply, output, media)
                yield {"type": f"response.{response['status']}", "response": response}

    async def _medium(
        self, medium: Medium, name: str
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
        """(output item of an image, entry of `mmllm.media` of another medium, Markdown link)."""
        encoded = await self.encoder.encode(medium)
        link = encoded.link and f"{markdown.SEPARATOR}{encoded.link}{markdown.SEPARATOR}"
        if medium.modality == "image":
            return _image(name, encoded.base64), None, link
        return None, encoded.part, link

    def _started(self) -> dict[str, Any]:
        """A response in progress."""
        request = self.request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": {},
            "model": self.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _finished(
        self, reply: Reply, output: Sequence[dict[str, Any]], media: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        cut = reply.finish == "length"
        tokens = reply.usage
        generated = tokens.text + tokens.signals
        return {
            **self._started(),
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": list(output),
            "usage": {
                "input_tokens": tokens.prompt,
                "input_tokens_details": {"cached_tokens": tokens.cached},
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens.prompt + generated,
            },
            "mmllm": {
                **encoding.reply_extras([reply], self.request.ignored),
                "media": list(media),
            },
        }


def _message(name: str, text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": name,
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [part],
    }


def _image(name: str, data: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "type": "image_generation_call",
        "status": "completed",
        "output_format": "png",
        "result": data,
    }


def _item_event(what: str, item: dict[str, Any], index: int) -> dict[str, Any]:
    return {"type": f"response.output_item.{what}", "output_index": index, "item": dict(item)}


def _begin_of_text(message: dict[str, Any], place: dict[str, Any]) -> Iterator[dict[str, Any]]:
    begun = {**message, "status": "in_progress", "content": []}
    yield _item_event("added", begun, place["output_index"])
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    yield {"type": "response.content_part.added", **place, "content_index": 0, "part": part}


def _delta(place: dict[str, Any], text: str) -> dict[str, Any]:
    delta = {"content_index": 0, "delta": text, "logprobs": []}
    return {"type": "response.output_text.delta", **place, **delta}


def _end_of_text(message: dict[str, Any], index: int) -> Iterator[dict[str, Any]]:
    part = message["content"][0]
    place = {"output_index": index, "item_id": message["id"], "content_index": 0}
    yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": dict(part)}
    yield _item_event("done", message, index)
