"""/v1/chat/completions by the official client, against the Python API with the same seed."""

from __future__ import annotations

import asyncio
import base64
import functools
from itertools import pairwise
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from mmllm.conversation import (
    Audio,
    Image,
    Medium,
    SampledVideo,
    Video,
    assistant,
    system,
    user,
)
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.media import read_provenance
from mmllm.server.media_decoding import DecodeBudget, MediaDecoder
from mmllm.server.settings import ServerSettings
from tests.samples import sound
from tests.server.conftest import Served
from tests.server.exchange import ALL, files_in, files_of, replied
from tests.server.files import AUDIO, IMAGE, MOVING, MP4, PNG, TEXT, VIDEO, WAV, file_of

OPTIONS: dict[str, Any] = {"seed": 3, "temperature": 1.0, "max_tokens": 12}
ASKED = [{"role": "user", "content": [IMAGE, TEXT, AUDIO, VIDEO]}]
CONVERSATION = [user(Image(PNG), TEXT["text"], Audio(WAV), Video(MP4))]


def test_a_reply_is_that_of_the_python_api_to_the_byte(chat: Chat, client: openai.OpenAI) -> None:
    response = client.chat.completions.create(
        model="tiny", messages=ASKED, extra_body={"modalities": ALL}, **OPTIONS
    )
    reply = replied(chat, CONVERSATION, modalities=ALL)
    message = response.choices[0].message
    assert files_in(message.parts) == files_of(reply.message)
    assert len(reply.media) == 3
    assert message.content == reply.text
    assert message.images == [
        {"index": 0, **part} for part in message.parts if part["type"] == "image_url"
    ]
    (sound,) = (part for part in message.parts if part["type"] == "input_audio")
    assert message.audio
    assert message.audio.data == sound["input_audio"]["data"]
    assert response.choices[0].finish_reason == {"length": "length"}.get(reply.finish, "stop")
    assert response.usage
    assert response.usage.prompt_tokens == reply.usage.prompt
    assert response.usage.completion_tokens == len(reply.ids) + 4 + 3 + 5
    assert response.mmllm["seed"] == 3
    mark = read_provenance(files_in(message.images)[0])
    assert mark
    assert (mark["seed"], mark["model"]) == (3, "tiny")


def test_a_stream_adds_up_to_the_whole_reply(chat: Chat, client: openai.OpenAI) -> None:
    """By the client's own helper, which merges deltas by their index."""
    reply = replied(chat, CONVERSATION, modalities=ALL)
    steps: dict[int, list[int]] = {}
    with client.chat.completions.stream(
        model="tiny",
        messages=ASKED,
        stream_options={"include_usage": True},
        extra_body={"modalities": ALL},
        **OPTIONS,
    ) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        whole = stream.current_completion_snapshot
    for chunk in chunks:
        progress = (chunk.model_extra or {}).get("mmllm", {}).get("progress")
        if progress:
            steps.setdefault(progress["part"], []).append(progress["step"])
    message = whole.choices[0].message
    assert files_in(message.parts) == files_of(reply.message)
    assert message.content == reply.text
    assert message.audio
    assert base64.b64decode(message.audio.data) in files_of(reply.message)
    assert files_in(message.images)[0] in files_of(reply.message)
    assert list(steps.values()) == [[1, 2]] * 3
    assert whole.usage
    assert whole.usage.prompt_tokens == reply.usage.prompt
    kinds = ["".join(chunk.choices[0].delta.model_fields_set) for chunk in chunks[:-1]]
    first_step = next(n for n, chunk in enumerate(chunks) if "progress" in str(chunk.model_extra))
    assert any("content" in kind for kind in kinds[1:first_step]), "text comes before the work"
    assert chunks[-2].choices[0].finish_reason
    assert chunks[-2].model_extra["mmllm"]["seed"] == 3


def test_text_streams_in_pieces(chat: Chat, client: openai.OpenAI) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"}]
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model="tiny", messages=asked, modalities=["text"], stream=True, **OPTIONS
        )
    ]
    forbidden = dict.fromkeys(ALL, "forbid")
    reply = replied(chat, [system("Be brief."), user("one two")], modalities=forbidden)
    assert "".join(pieces) == reply.text
    assert sum(map(bool, pieces)) > 3


@pytest.mark.parametrize("form", ["as it came", "content parts", "openai's fields"])
def test_a_reply_sent_back_is_part_of_the_conversation(
    chat: Chat, client: openai.OpenAI, form: str
) -> None:
    only = {"image": "force", "audio": "forbid", "video": "forbid"}
    first = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "draw"}],
        extra_body={"modalities": only},
        **OPTIONS,
    )
    message = first.choices[0].message
    earlier: Any = {
        "as it came": message,
        "content parts": {"role": "assistant", "content": message.parts},
        "openai's fields": {
            "role": "assistant",
            "content": message.content,
            "images": message.images,
            "tool_calls": None,
            "refusal": None,
        },
    }[form]
    second = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": "draw"},
            earlier,
            {"role": "user", "content": "what did you draw?"},
        ],
        extra_body={"modalities": only},
        **OPTIONS,
    )
    before = replied(chat, [user("draw")], modalities=only).message
    parts = before.parts if form != "openai's fields" else (before.text, *before.media)
    turns = [user("draw"), assistant(*parts), user("what did you draw?")]
    reply = replied(chat, turns, modalities=only)
    assert files_in(second.choices[0].message.parts) == files_of(reply.message)
    assert second.usage
    assert second.usage.prompt_tokens == reply.usage.prompt
    alone = replied(chat, turns[-1:], modalities=only)
    assert reply.usage.prompt > alone.usage.prompt + 4


@pytest.mark.parametrize(
    ("given", "choices"),
    [
        (["text", "audio"], {"image": "forbid", "audio": "auto", "video": "forbid"}),
        ({"video": "force", "image": "forbid"}, {"video": "force", "image": "forbid"}),
        (None, {}),
    ],
)
def test_modalities_and_options_reach_the_engine(
    chat: Chat, http: httpx2.Client, given: Any, choices: dict
) -> None:
    body = {
        "messages": [{"role": "user", "content": "one two three"}],
        "modalities": given,
        "decoders": {"image": {"steps": 3, "guidance": 2.0}, "video": {"frames": 9}},
        "stop": "e",
        "top_p": 0.9,
        "top_k": 50,
        "repetition_penalty": 1.1,
        "max_media": 2,
        "user": "somebody",
        "n": 1,
        "tools": [],
        **OPTIONS,
    }
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    reply = replied(
        chat,
        [user("one two three")],
        modalities=choices,
        decoders=body["decoders"],
        stop=["e"],
        top_p=0.9,
        top_k=50,
        repetition_penalty=1.1,
        max_media=2,
    )
    assert files_in(response.json()["choices"][0]["message"]["parts"]) == files_of(reply.message)


def test_a_budget_of_the_requests_media_is_kept_or_refused(http: httpx2.Client) -> None:
    """The picture takes 4 tokens, whatever its size."""
    body = {"messages": [{"role": "user", "content": [IMAGE, TEXT]}], **OPTIONS}
    replies = [
        http.post("/v1/chat/completions", json={**body, "media_tokens": tokens})
        for tokens in (3, 4, 0)
    ]
    assert [reply.status_code for reply in replies] == [400, 200, 400]
    assert "takes 4 tokens" in replies[0].json()["error"]["message"]
    assert replies[2].json()["error"]["param"] == "media_tokens"
    whole = http.post("/v1/chat/completions", json=body).json()
    assert replies[1].json()["choices"] == whole["choices"]


def test_a_video_is_decoded_whole_where_an_encoder_reads_its_track() -> None:
    film = Video.from_numpy(MOVING, 4.0, audio=sound(1.0))
    decoder = MediaDecoder(ServerSettings())

    def decoded(whole: bool) -> Medium:
        budget = DecodeBudget(1 << 24, [2], needs_whole_videos=whole)
        open_medium = functools.partial(Video, source=file_of(film, "mp4"))
        return asyncio.run(decoder.decode("video", open_medium, budget))

    whole = decoded(True)
    assert isinstance(whole, Video)
    assert whole.array is not None
    assert (len(whole.array), whole.fps) == (4, 4.0)
    assert whole.audio is not None
    direct = Video(source=file_of(film, "mp4")).decoded()
    assert direct.audio is not None
    np.testing.assert_array_equal(whole.audio.to_numpy(), direct.audio.to_numpy())
    assert isinstance(decoded(False), SampledVideo)


def test_a_seed_is_drawn_and_reported(http: httpx2.Client) -> None:
    body = {"messages": [{"role": "user", "content": "one"}], "temperature": 2.0, "max_tokens": 8}
    replies = [http.post("/v1/chat/completions", json=body).json() for _ in range(2)]
    assert replies[0]["mmllm"]["seed"] != replies[1]["mmllm"]["seed"]
    again = http.post("/v1/chat/completions", json={**body, "seed": replies[0]["mmllm"]["seed"]})
    assert again.json()["choices"] == replies[0]["choices"]


def test_a_full_context_is_reported(http: httpx2.Client) -> None:
    old = [{"role": "user", "content": "one two three " * 24} for _ in range(3)]
    body = {"messages": [*old, {"role": "user", "content": "what?"}], "max_tokens": 4}
    response = http.post("/v1/chat/completions", json=body)
    assert "the oldest" in response.json()["mmllm"]["notes"][0]
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "one " * 999}], "stream": stream}
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "shorten it" in error["message"]


def test_choices_are_the_replies_of_their_seeds(chat: Chat, client: openai.OpenAI) -> None:
    response = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "one two"}], n=3, **OPTIONS
    )
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    (first, *_) = response.choices
    assert files_in(first.message.parts) == files_of(replied(chat, [user("one two")]).message)
    alone = [replied(chat, [user("one two")], seed=seed) for seed in (3, 4, 5)]
    assert [choice.message.content for choice in response.choices] == [one.text for one in alone]
    assert response.usage
    assert response.usage.prompt_tokens == alone[0].usage.prompt
    generated = sum(reply.usage.text + reply.usage.signals for reply in alone)
    assert response.usage.completion_tokens == generated
    with pytest.raises(openai.BadRequestError, match="a stream holds one choice"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], n=2, stream=True
        )


# --- the other endpoints ------------------------------------------------------------------------


def made(chat: Chat, modality: str, prompt: str, seed: int, **decoder: Any) -> Medium:
    """The medium that the Python API generates for a prompt."""
    choices = {**dict.fromkeys(ALL, "forbid"), modality: "force"}
    reply = chat.reply(
        [user(prompt)],
        seed=seed,
        modalities=choices,
        max_media=1,
        decoders={modality: decoder} if decoder else {},
    )
    (medium,) = reply.media
    return medium


def test_pictures(chat: Chat, client: openai.OpenAI) -> None:
    response = client.images.generate(
        model="tiny", prompt="a red apple", n=2, extra_body={"seed": 7, "decoder": {"steps": 3}}
    )
    assert response.data
    assert [entry.seed for entry in response.data] == [7, 8]
    for entry in response.data:
        picture = Image(base64.b64decode(entry.b64_json or "")).to_numpy().astype(int)
        plain = made(chat, "image", "a red apple", entry.seed, steps=3).to_numpy()
        assert abs(picture - plain).max() <= 1, "a batch differs from single calls by rounding"

    one = client.images.generate(
        model="tiny", prompt="blue", output_format="webp", extra_body={"seed": 7}
    )
    assert one.data
    assert base64.b64decode(one.data[0].b64_json or "") == file_of(
        made(chat, "image", "blue", 7), "webp"
    )


def test_sounds(chat: Chat, client: openai.OpenAI) -> None:
    extra = {"seed": 7, "decoder": {"seconds": 0.1}}
    for kind in ("wav", "flac"):
        response = client.audio.speech.create(
            model="tiny", voice="any", input="rain", response_format=kind, extra_body=extra
        )
        assert response.response.headers["content-type"] == f"audio/{kind}"
        assert response.response.headers["x-mmllm-seed"] == "7"
        assert response.content == file_of(made(chat, "audio", "rain", 7, seconds=0.1), kind)


def test_a_transcription_describes_the_sound(chat: Chat, client: openai.OpenAI) -> None:
    transcription = client.audio.transcriptions.create(
        model="tiny", file=("rain.wav", WAV), language="en"
    )
    forbidden = dict.fromkeys(ALL, "forbid")
    reply = chat.reply([user(Audio(WAV), "What do you hear?")], modalities=forbidden)
    assert transcription.text == reply.text
    asked = client.audio.transcriptions.create(
        model="tiny", file=("rain.wav", WAV), prompt="two", response_format="text"
    )
    assert asked == chat.reply([user(Audio(WAV), "two")], modalities=forbidden).text
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(model="tiny", file=("cat.png", PNG))
    assert caught.value.param == "file"


def test_a_model_that_cannot_hear_says_so(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.service.options, "input_modalities", frozenset({"image"}))
    with pytest.raises(openai.BadRequestError, match="cannot hear: it reads text, image"):
        client.audio.transcriptions.create(model="tiny", file=("rain.wav", WAV))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_clip_is_asked_for_by_a_form(client: openai.OpenAI) -> None:
    """As the client sends it by itself."""
    job = client.videos.create(prompt="a rocket")
    assert job.status in ("queued", "in_progress")
    client.videos.delete(job.id)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clips_are_jobs(chat: Chat, client: openai.OpenAI, http: httpx2.Client) -> None:
    as_json = {"Content-Type": "application/json"}
    job = client.videos.create(
        prompt="a rocket", extra_headers=as_json, extra_body={"seed": 7, "decoder": {"fps": 2}}
    )
    assert job.status in ("queued", "in_progress")
    seen = [job.progress]
    while job.status not in ("completed", "failed"):
        job = client.videos.retrieve(job.id)
        seen.append(job.progress)
    assert job.status == "completed", job.error
    assert all(before <= after for before, after in pairwise(seen))
    assert seen[-1] == 100
    clip = made(chat, "video", "a rocket", 7, fps=2)
    data = client.videos.download_content(job.id).content
    assert data == file_of(clip, "mp4")
    frames, height, width, _ = clip.to_numpy().shape
    assert (job.seconds, job.size) == (f"{frames / 2:g}", f"{width}x{height}")
    assert client.videos.delete(job.id).deleted
    assert http.get(f"/v1/videos/{job.id}").status_code == 404
    assert http.get(f"/v1/videos/{job.id}/content").json()["error"]["code"] == "not_found"


def test_a_clip_that_cannot_be_made_says_why(
    chat: Chat, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "a rocket", "decoder": {"frames": 6}}
    refused = http.post("/v1/videos", json=body)
    assert refused.status_code == 400
    assert "5 would do" in refused.json()["error"]["message"]

    def late(*_: Any, **__: Any) -> None:
        raise ConfigError("5 would do")

    monkeypatch.setattr(chat.engine, "generate", late)
    job = http.post("/v1/videos", json={"prompt": "a rocket"}).json()
    while job["status"] not in ("completed", "failed"):
        job = http.get(f"/v1/videos/{job['id']}").json()
    assert job["status"] == "failed"
    assert "5 would do" in job["error"]["message"]
    content = http.get(f"/v1/videos/{job['id']}/content")
    assert content.status_code == 409
    assert "5 would do" in content.json()["error"]["message"]
    http.delete(f"/v1/videos/{job['id']}")


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.reads) == ("tiny", ["audio", "image", "video"])
    assert "seconds" in card.makes["audio"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.chat.completions.create(model="gpt-4", messages=ASKED)


def test_sounds_of_a_reply_come_in_the_format_that_was_asked_for(
    chat: Chat, client: openai.OpenAI
) -> None:
    choices = {**dict.fromkeys(ALL, "forbid"), "audio": "force"}
    response = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "rain"}],
        audio={"voice": "any", "format": "flac"},
        extra_body={"modalities": choices},
        **OPTIONS,
    )
    reply = replied(chat, [user("rain")], modalities=choices)
    audio = response.choices[0].message.audio
    assert audio
    assert base64.b64decode(audio.data) == file_of(reply.media[0], "flac")
