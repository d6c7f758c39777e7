"""Who may ask, what is refused, and that a refusal is the API's own JSON that says how to mend."""

from __future__ import annotations

import base64
import logging
import socket
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from mmllm.conversation import Image
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.server.settings import ServerSettings
from tests.server.conftest import Served
from tests.server.exchange import CHAT, asking, error_of
from tests.server.files import AUDIO, IMAGE, MP4, PNG, TEXT, WAV, data_uri, file_of

# --- who may ask --------------------------------------------------------------------------------


def test_a_token_is_required_before_the_body_is_read(serve: Callable[..., Served]) -> None:
    served = serve(token="s3cret")
    with served.http() as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            response = http.post(CHAT, content=b"{", headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/metrics").status_code == 401
        assert http.get("/health").status_code == 200
        document = http.get("/openapi.json", headers={"authorization": "bearer s3cret"}).json()
        assert document["security"] == [{"token": []}]
    assert served.openai("s3cret").models.list().data[0].id == "tiny"
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer TOKEN"):
        served.openai("other").models.list()


def test_a_local_server_accepts_local_host_names_only(http: httpx2.Client, served: Served) -> None:
    """A web page could make its own name resolve to 127.0.0.1."""
    port = served.url.rpartition(":")[2]
    assert (
        "localhost"
        in error_of(http.get("/v1/models", headers={"host": f"evil.example:{port}"}), 403)[
            "message"
        ]
    )
    assert http.get("/v1/models", headers={"host": f"LOCALHOST:{port}"}).status_code == 200


def test_web_pages_of_other_origins_cannot_send_requests(http: httpx2.Client) -> None:
    """text/plain, which a page may post anywhere, is not read as JSON, and no origin is allowed."""
    body = b'{"messages": [{"role": "user", "content": "one"}]}'
    response = http.post(CHAT, content=body, headers={"content-type": "text/plain"})
    assert "application/json" in error_of(response)["message"]
    response = http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("token", ["", "two words", "tökén"])
def test_a_token_that_cannot_be_sent_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="visible ASCII"):
        ServerSettings(token=token)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "'assistant'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
            "messages.0.content.0",
            "'image_url'",
        ),
        (
            {"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]},
            "messages.0.audio",
            "send `data` too",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported"),
        ({"frequency_penalty": 1.0}, "frequency_penalty", "unsupported"),
        ({"temprature": 1.0}, "temprature", "unknown"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**9}, "max_tokens", "at most 4096"),
        ({"max_completion_tokens": 5}, "max_tokens", "mean the same"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"modalities": ["audio"]}, "modalities", 'add "text"'),
        ({"modalities": ["text", "smell"]}, "modalities", "unknown 'smell'"),
        ({"modalities": {"text": "force"}}, "modalities", "text is in every reply"),
        ({"decoders": {"smell": {}}}, "decoders", "unknown 'smell'"),
        ({"decoders": {"image": {"stpes": 3}}}, "decoders.image.stpes", "unknown"),
        ({"decoders": {"image": {"seconds": 3}}}, "decoders.image", "this decoder takes steps"),
        ({"decoders": {"image": {"steps": 999}}}, "decoders.image.steps", "at most 200"),
        (
            {"decoders": {"image": {"width": 9999, "height": 9999}}},
            "decoders.image: width x height",
            "at most",
        ),
        ({"decoders": {"video": {"frames": 6}}}, "decoders.video", "5 would do"),
        ({"audio": {"format": "aac"}}, "audio.format", "'flac' or 'mp3'"),
    ],
)
def test_invalid_requests(
    http: httpx2.Client, change: dict, param: str | None, message: str
) -> None:
    error = error_of(http.post(CHAT, json={**asking(TEXT), **change}))
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/images/generations", {"prompt": "x", "size": "1x"}, "size"),
        ("/v1/images/generations", {"prompt": "x", "response_format": "uri"}, "b64_json"),
        ("/v1/images/generations", {"prompt": "x", "quality": "hd"}, "quality: unknown"),
        ("/v1/images/generations", {"prompt": "x", "decoder": {"seconds": 1}}, "takes steps"),
        ("/v1/images/generations", {"prompt": "x", "size": "9000x9000"}, "at most"),
        ("/v1/images/generations", {"prompt": "x" * 100_001}, "characters"),
        (
            "/v1/images/generations",
            {"prompt": "x", "n": 8, "seed": 2**63 - 2},
            "too large to count up",
        ),
        ("/v1/audio/speech", {"input": "x", "speed": 2}, "speed: unknown"),
        ("/v1/audio/speech", {"input": "x", "response_format": "aac"}, "'wav', 'flac' or 'mp3'"),
        ("/v1/audio/speech", {"voice": "x"}, "input"),
        ("/v1/videos", {"prompt": "x", "size": "16x16", "decoder": {"width": 8}}, "twice"),
        ("/v1/videos", {"prompt": "x", "seconds": "4"}, "decoder takes"),
        ("/v1/videos", {"prompt": "x", "input_reference": "y"}, "input_reference: unknown"),
    ],
)
def test_the_other_endpoints_refuse_too(
    http: httpx2.Client, path: str, body: dict, message: str
) -> None:
    assert message in error_of(http.post(path, json=body))["message"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"image_url": {"url": "data:image/png;base64,####"}}, "not valid base64"),
        ({"image_url": {"url": "data:image/png,abc"}}, "expected data:TYPE;base64"),
        ({"image_url": {"url": "data:image/png;base64,"}}, "empty"),
        ({"image_url": {"url": data_uri(PNG[:40], "image/png")}}, "damaged"),
        ({"image_url": {"url": data_uri(b"hello", "image/png")}}, "in a format that is known"),
        ({"image_url": {"url": data_uri(MP4, "image/png")}}, "expected an image, got a video"),
        ({"image_url": {"url": "/etc/passwd"}}, "fetches no URLs"),
        ({"image_url": {"url": "file:///etc/passwd"}}, "fetches no URLs"),
        ({"image_url": {"url": "http://127.0.0.1/x.png"}}, "fetches no URLs"),
        ({"input_audio": {"data": base64.b64encode(WAV[:60]).decode()}}, "announced"),
        ({"video_url": {"url": data_uri(MP4[:500], "video/mp4")}}, "video_url"),
    ],
)
def test_broken_media(http: httpx2.Client, part: dict, message: str) -> None:
    kind = next(iter(part))
    error = error_of(http.post(CHAT, json=asking(TEXT, {"type": kind, **part})))
    assert message in error["message"] + str(error["param"])
    assert error["param"].startswith(f"messages.0.content.1.{kind}")


@pytest.mark.parametrize(
    ("limits", "part", "message"),
    [
        ({"pixels": 1000}, IMAGE, "pixels"),
        ({"seconds": 0.001}, AUDIO, "seconds"),
        ({"decoded_bytes": 5000}, IMAGE, "bytes when decoded"),
        ({"bytes": 60}, AUDIO, "108 bytes, more than the limit of 60"),
    ],
)
def test_large_media_are_refused_by_their_headers(
    serve: Callable[..., Served], limits: dict, part: dict, message: str
) -> None:
    from dataclasses import replace

    big = Image.from_numpy(np.zeros((40, 60, 3), np.uint8))
    if part is IMAGE:
        url = data_uri(file_of(big, "png"), "image/png")
        part = {"type": "image_url", "image_url": {"url": url}}
    served = serve(input_limits=replace(ServerSettings().input_limits, **limits))
    with served.http() as http:
        error = error_of(http.post(CHAT, json=asking(part)))
    assert message in error["message"]
    assert "mmllm.media" not in error["message"], "that remedy is for Python programs"


def test_all_media_of_a_request_share_what_may_be_decoded(serve: Callable[..., Served]) -> None:
    from dataclasses import replace

    served = serve(
        input_limits=replace(ServerSettings().input_limits, decoded_bytes=100),
        max_input_media=3,
    )
    with served.http() as http:
        assert http.post(CHAT, json=asking(IMAGE, IMAGE)).status_code == 200  # 48 bytes each
        error = error_of(http.post(CHAT, json=asking(IMAGE, IMAGE, IMAGE)))
        assert error["param"] == "messages.0.content.2.image_url.url"
        error = error_of(http.post(CHAT, json=asking(IMAGE, IMAGE, IMAGE, IMAGE)))
        assert "4 pictures, sounds and clips, more than 3" in error["message"]


def test_large_and_slow_bodies_are_refused(serve: Callable[..., Served]) -> None:
    served = serve(max_body_bytes=1000, max_body_seconds=0.5)
    with served.http() as http:
        error_of(http.post(CHAT, json=asking({"type": "text", "text": "x" * 1000})), 413)
        chunks = (b"x" * 100 for _ in range(100))
        error_of(http.post(CHAT, content=chunks), 413)
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/health", 405)],
)
def test_paths_and_methods(http: httpx2.Client, method: str, path: str, status: int) -> None:
    error = error_of(http.request(method, path), status)
    assert path in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"null",
        b"[]",
        b"3",
        b'{"messages": NaN}',
        b'{"messages": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b"\xff\xfe\x00",
    ],
)
def test_bodies_that_are_not_requests(http: httpx2.Client, body: bytes) -> None:
    error_of(http.post(CHAT, content=body, headers={"content-type": "application/json"}))


def test_a_fault_of_the_server_is_logged_and_not_disclosed(
    chat: Chat,
    http: httpx2.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("/a/secret/path")

    monkeypatch.setattr(chat.engine, "generate", broken)
    with caplog.at_level(logging.ERROR):
        for stream in (False, True):
            error = error_of(http.post(CHAT, json=asking(TEXT, stream=stream)), 500)
            assert "secret" not in error["message"]
            assert error["type"] == "server_error"
    assert "/a/secret/path" in caplog.text
    monkeypatch.undo()
    assert http.post(CHAT, json=asking(TEXT)).status_code == 200
