"""What a lenient server drops and names, and what pictures, sounds and web pages are asked for."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image as PILImage

from mmllm.conversation import Audio
from mmllm.errors import ConfigError, MediaError
from mmllm.media import read_provenance
from mmllm.server.settings import ServerSettings
from tests.server.conftest import Served
from tests.server.files import PNG

ASKED = [{"role": "user", "content": "one two"}]
CHAT = {"messages": ASKED, "max_tokens": 4, "seed": 1, "modalities": ["text"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
UNKNOWN: dict[str, Any] = {
    "tools": [TOOL],
    "response_format": {"type": "json_object"},
    "logprobs": True,
    "frequency_penalty": 0.2,
    "nonsense": {"a": [1]},
    "größe": 3,
}


@pytest.fixture
def lenient(serve: Callable[..., Served]) -> Served:
    return serve(lenient=True)


def ignored_in(response: httpx2.Response) -> list[str]:
    header = response.headers.get("x-mmllm-ignored", "")
    return [httpx2.URL(f"http://x/{name}").path[1:] for name in header.split(", ") if name]


def test_unknown_fields_are_dropped_and_named(lenient: Served, http: httpx2.Client) -> None:
    with lenient.http() as soft:
        plain = soft.post("/v1/chat/completions", json=CHAT)
        asked = {**CHAT, **UNKNOWN, "user": "me", "parallel_tool_calls": True}
        response = soft.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    message = response.json()["choices"][0]["message"]
    assert message == plain.json()["choices"][0]["message"]
    assert set(response.json()["mmllm"]["ignored"]) == set(UNKNOWN)
    assert set(ignored_in(response)) == set(UNKNOWN)
    assert "ignored" not in plain.json()["mmllm"]
    assert "x-mmllm-ignored" not in plain.headers
    for name, value in UNKNOWN.items():
        refused = http.post("/v1/chat/completions", json={**CHAT, name: value})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == name
        assert "--lenient" in refused.json()["error"]["message"]


def test_fields_within_fields_are_named_by_their_paths(lenient: Served) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "one", "cache_control": {}}]}]
    asked = {**CHAT, "messages": messages, "decoders": {"image": {"magic": 1}}, "stream": True}
    with lenient.http() as soft:
        response = soft.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    names = {"messages.0.content.0.cache_control", "decoders.image.magic"}
    assert set(ignored_in(response)) == names
    assert all(name in response.text.split("finish_reason")[-1] for name in names)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"max_tokens": 10**6}, "max_tokens"),
    ],
)
def test_wrong_values_stay_errors(lenient: Served, change: dict[str, Any], param: str) -> None:
    with lenient.http() as soft:
        response = soft.post("/v1/chat/completions", json={**CHAT, **UNKNOWN, **change})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_another_models_name_is_named(lenient: Served) -> None:
    with lenient.openai() as client:
        raw = client.audio.speech.with_raw_response.create(
            model="tts-1", voice="alloy", input="rain", response_format="wav"
        )
        assert raw.headers["x-mmllm-ignored"] == "model"
        answer = client.chat.completions.create(**{**CHAT, "model": "gpt-4o"})
    assert answer.model == "tiny"
    assert answer.mmllm["ignored"] == ["model"]


def test_a_picture_of_another_size_is_reported(lenient: Served, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "x", "extra_body": {"seed": 1}}
    usual = client.images.generate(**asked)
    assert usual.data
    assert usual.data[0].b64_json
    size = PILImage.open(io.BytesIO(base64.b64decode(usual.data[0].b64_json))).size
    own = client.images.generate(**asked, size=f"{size[0]}x{size[1]}")
    assert own.data == usual.data
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**asked, quality="hd")
    assert caught.value.param == "quality"
    with lenient.openai() as soft:
        wishes: dict[str, Any] = {"quality": "hd", "style": "vivid", "size": "1023x511"}
        raw = soft.images.with_raw_response.generate(**asked, **wishes)
    made = raw.parse()
    assert set(raw.headers["x-mmllm-ignored"].split(", ")) == set(wishes)
    assert set(made.mmllm["ignored"]) == set(wishes)
    assert made.data == usual.data


def test_pictures_behind_urls(client: openai.OpenAI, http: httpx2.Client) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "x", "n": 2, "extra_body": {"seed": 1}}
    files = client.images.generate(**asked, response_format="b64_json").data
    urls = client.images.generate(**asked, response_format="url").data
    assert files
    assert urls
    assert len({made.url for made in urls}) == len(urls) == 2
    for file, made in zip(files, urls, strict=True):
        assert made.b64_json is None
        assert made.url
        assert http.get(made.url).content == base64.b64decode(file.b64_json or "")


def test_speech_is_mp3_where_it_is_asked_for(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "voice": "a", "input": "x", "extra_body": {"seed": 1}}
    made = client.audio.speech.create(**asked, response_format="mp3")
    wav = Audio(client.audio.speech.create(**asked, response_format="wav").content).decoded()
    assert made.response.headers["content-type"] == "audio/mpeg"
    sound = Audio(made.content).decoded()
    seconds = [one.to_numpy().shape[1] / (one.sample_rate or 1) for one in (sound, wav)]
    assert abs(seconds[0] - seconds[1]) < 0.2
    mark = read_provenance(made.content)
    assert mark
    assert mark["seed"] == 1


@pytest.mark.parametrize(("rate", "comes"), [(10_000, 11_025), (16_000, 16_000), (96_000, 48_000)])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_holds_the_sound(rate: int, comes: int, channels: int) -> None:
    wave = 0.5 * np.sin(440 * 2 * np.pi * np.arange(rate) / rate)
    tone = Audio.from_numpy(np.stack([wave] * channels).astype(np.float32), rate)
    back = Audio(tone.to_bytes("mp3")).decoded()
    samples = back.to_numpy()
    assert back.sample_rate == comes
    assert samples.shape[0] == channels
    loudest = np.abs(np.fft.rfft(samples[0])).argmax() * comes / samples.shape[1]
    assert abs(loudest - 440) < 2
    assert abs(samples.std() - wave.std()) < 0.02


def test_mp3_of_many_channels_is_one_clear_error() -> None:
    with pytest.raises(MediaError, match="at most 2 channels, got 3"):
        Audio.from_numpy(np.zeros((3, 8000), np.float32), 8000).to_bytes("mp3")


def test_cors_is_allowed_for_configured_origins(
    serve: Callable[..., Served], http: httpx2.Client
) -> None:
    page = "http://localhost:3000"
    before = {
        "origin": page,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    served = serve(allow_origins=frozenset({page}), token="secret")
    with served.http() as allowed:
        asked = allowed.options("/v1/chat/completions", headers=before)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == page
        refused = allowed.get("/v1/models", headers={"origin": page})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == page, "the page can read why"
        other = allowed.get("/health", headers={"origin": "http://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        before["origin"] = "http://evil.example"
        assert allowed.options("/v1/chat/completions", headers=before).status_code == 400
    assert (
        "access-control-allow-origin" not in http.get("/health", headers={"origin": page}).headers
    )


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/x", "", "https://a b"])
def test_origins_are_checked(origin: str) -> None:
    with pytest.raises(ConfigError, match="allow_origins: expected"):
        ServerSettings(allow_origins=frozenset({origin}))


def test_a_mask_that_is_no_file_is_not_dropped(lenient: Served) -> None:
    """The whole picture would change."""
    files = {"image": ("cat.png", PNG, "image/png")}
    with lenient.http() as soft:
        form = {"prompt": "one", "mask": "mask.png"}
        response = soft.post("/v1/images/edits", files=files, data=form)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "mask"
    assert "expected one file, got a text" in response.json()["error"]["message"]
