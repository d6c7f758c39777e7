"""/v1/responses by the official client, against the Python API with the same seed."""

from __future__ import annotations

import base64
from typing import Any

import httpx2
import openai
import pytest

from mmllm.conversation import Image, Text, assistant, system, user
from mmllm.inference.chat import Chat
from mmllm.inference.replies import Reply
from tests.server.exchange import ALL, replied
from tests.server.files import IMAGE, PNG, WAV, file_of

OPTIONS: dict[str, Any] = {"model": "tiny", "temperature": 1.0, "max_output_tokens": 12}
EXTRA: dict[str, Any] = {"seed": 3}
SHOWN = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": IMAGE["image_url"]["url"], "detail": "auto"},
            {"type": "input_text", "text": "what is this?"},
        ],
    }
]
ONLY_IMAGE = {"image": "force", "audio": "forbid", "video": "forbid"}

BROKEN = {"type": "input_image", "image_url": "data:image/png;base64,x"}


def images(response: Any) -> list[bytes]:
    """The files of a response's images."""
    calls = [item for item in response.output if item.type == "image_generation_call"]
    return [base64.b64decode(call.result) for call in calls]


def expected(reply: Reply, modality: str = "image", suffix: str = "png") -> list[bytes]:
    return [file_of(medium, suffix) for medium in reply.media if medium.modality == modality]


def test_a_picture_in_and_a_picture_out(chat: Chat, client: openai.OpenAI) -> None:
    reply = replied(chat, [user(Image(PNG), "what is this?")], modalities=ONLY_IMAGE)
    response = client.responses.create(
        input=SHOWN, extra_body={**EXTRA, "modalities": ONLY_IMAGE}, **OPTIONS
    )
    assert response.output_text == reply.text
    assert images(response) == expected(reply)
    assert response.usage
    assert response.usage.input_tokens == reply.usage.prompt
    assert response.mmllm["seed"] == 3
    assert response.status == ("incomplete" if reply.finish == "length" else "completed")
    order = [item.type == "image_generation_call" for item in response.output]
    assert order == [not isinstance(part, Text) for part in reply.message.parts]


def test_a_stream_adds_up_to_the_response(chat: Chat, client: openai.OpenAI) -> None:
    reply = replied(chat, [user("one two")], modalities=ALL)
    asked = {"input": "one two", **OPTIONS}
    events = list(
        client.responses.create(stream=True, extra_body={**EXTRA, "modalities": ALL}, **asked)
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1].response
    assert events[-1].type in ("response.completed", "response.incomplete")
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == reply.text == last.output_text
    assert images(last) == expected(reply)
    done = [event for event in events if event.type == "response.output_item.done"]
    by_index = {event.output_index: event.item for event in done}
    assert [by_index[index] for index in sorted(by_index)] == last.output
    kinds = {event.type for event in events}
    assert "response.image_generation_call.generating" in kinds
    audio, video = (medium for medium in last.mmllm["media"])
    if audio["type"] != "input_audio":
        audio, video = video, audio
    assert base64.b64decode(audio["input_audio"]["data"]) in expected(reply, "audio", "wav")
    assert video["video_url"]["url"].startswith("data:video/mp4;base64,")


@pytest.mark.parametrize("media", ["markdown", "urls"])
@pytest.mark.parametrize("stream", [True, False])
def test_text_shows_media_where_it_is_asked_for(
    client: openai.OpenAI, media: str, stream: bool
) -> None:
    extra = {**EXTRA, "modalities": ONLY_IMAGE, "mmllm": {"media": media}}
    response: Any = client.responses.create(
        input="one two", stream=stream, extra_body=extra, **OPTIONS
    )
    if stream:
        *_, last = response
        response = last.response
    assert response.output_text.count("![picture](") == 1
    assert ("data:image/png" in response.output_text) == (media == "markdown")


def test_an_output_sent_back_is_part_of_the_conversation(chat: Chat, client: openai.OpenAI) -> None:
    first = client.responses.create(
        input="draw", extra_body={**EXTRA, "modalities": ONLY_IMAGE}, **OPTIONS
    )
    second = client.responses.create(
        input=[
            {"role": "user", "content": "draw"},
            *[item.to_dict() for item in first.output],
            {"role": "user", "content": "what did you draw?"},
        ],
        instructions="Be brief.",
        extra_body={**EXTRA, "modalities": ["text"]},
        **OPTIONS,
    )
    before = replied(chat, [user("draw")], modalities=ONLY_IMAGE).message
    turns = [
        system("Be brief."),
        user("draw"),
        *[assistant(part) for part in before.parts],
        user("what did you draw?"),
    ]
    reply = replied(chat, turns, modalities=dict.fromkeys(ALL, "forbid"))
    assert second.output_text == reply.text
    assert second.usage
    assert second.usage.input_tokens == reply.usage.prompt


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [BROKEN]}]}, "input.0.content.0.image_url.url"),
    ],
)
def test_unsupported_fields_are_named(
    http: httpx2.Client, change: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/responses", json={"input": "x", **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_sounds_are_read(chat: Chat, http: httpx2.Client) -> None:
    data = base64.b64encode(WAV).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    body = {"input": [{"role": "user", "content": [part]}], "modalities": ["text"]}
    assert http.post("/v1/responses", json=body).status_code == 200
