"""Hostile requests: each is answered or refused soon, and delays no other."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from mmllm.media import isolated
from mmllm.server import bodies
from mmllm.server import schemas as api
from mmllm.server.errors import ApiError
from mmllm.server.metrics import Metrics
from mmllm.server.middleware import AdmissionMiddleware
from mmllm.server.settings import ServerSettings
from tests.media.samples import many_frames
from tests.server.conftest import Served
from tests.server.exchange import CHAT, asking, error_of
from tests.server.files import AUDIO, IMAGE, PNG, TEXT, WAV, data_uri

PATIENCE = 5.0
"""Seconds, generous, for what takes no time and once took minutes."""


@contextmanager
def health_watched(served: Served) -> Iterator[list[float]]:
    """The response times of /health, which is requested throughout the block, in seconds."""
    taken: list[float] = []
    over = threading.Event()

    def watch() -> None:
        with served.http() as http:
            asked_last = False
            while not asked_last:  # once at least, however soon it is over
                asked_last = over.wait(0.01)
                began = time.monotonic()
                assert http.get("/health").status_code == 200
                taken.append(time.monotonic() - began)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 1}


@pytest.mark.parametrize(
    "url",
    [
        "data:" + "a" * 2_000_000,
        "data:" + "a;" * 1_000_000,
        "data:" + ";a=b" * 500_000,
        "data:image/png;" + "a=" * 500_000 + ";base64,",
        " " * 2_000_000 + "data:",
        "data:image/png;base64," + "=" * 2_000_000,
        "data:image/png;base64," + "%" * 2_000_000,
        "http://" + "a." * 500_000,
        "http://" + "[" * 50_000,
        "http://" + "@" * 500_000,
    ],
)
def test_urls_are_parsed_in_linear_time(served: Served, url: str) -> None:
    """An ambiguous pattern took quadratic time."""
    began = time.monotonic()
    with health_watched(served) as taken, served.http() as http:
        error = error_of(http.post(CHAT, json=asking(IMAGE, {**IMAGE, "image_url": {"url": url}})))
    assert error["param"] == "messages.0.content.1.image_url.url"
    assert len(error["message"]) < 500
    assert time.monotonic() - began < PATIENCE
    assert max(taken) < PATIENCE


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (content(*[{"x": 1}] * 40_000), "messages.0.content"),
        (content(*[{"type": "text", "text": ""}] * 30_000), "messages.0.content"),
        (content(*[[]] * 90_000), "messages.0.content"),
        (content(*[{"type": "smell"}] * 1000), "messages.0.content.0"),
        (content(*[{"x": 1}] * 300_000), None),
        ({"messages": [{}] * 60_000}, "messages"),
        ({"messages": [{}] * 500}, "messages.0"),
        ({**content(TEXT), "decoders": {str(n): {} for n in range(50_000)}}, "decoders"),
        ({**content(TEXT), "modalities": {str(n): 1 for n in range(50_000)}}, "modalities"),
        ({**content(TEXT), "modalities": [1] * 90_000}, "modalities"),
        ({**content(TEXT), "stop": [1] * 90_000}, "stop"),
        ({**content(TEXT), **{str(n): 1 for n in range(50_000)}}, None),
        ({**content({**TEXT, **{str(n): 1 for n in range(50_000)}})}, "messages.0.content.0"),
        ({**content(TEXT), "metadata": {"x": [[]] * 300_000}}, None),
    ],
)
def test_oversized_bodies_are_refused_without_validating_every_value(
    body: Any, param: str | None
) -> None:
    data = json.dumps(body).encode()
    began = time.monotonic()
    with pytest.raises(ApiError) as raised:
        bodies.parsed(api.ChatRequest, data)
    assert (raised.value.status, raised.value.param) == (400, param)
    assert len(raised.value.message) < 1000
    assert time.monotonic() - began < PATIENCE


def test_large_valid_bodies_are_accepted() -> None:
    long = content(*[TEXT] * api.MOST_PARTS) | {"metadata": {"x": ["y"] * 20_000}}
    assert len(bodies.parsed(api.ChatRequest, json.dumps(long).encode()).messages) == 1
    marked = b"\xef\xbb\xbf" + json.dumps(content(TEXT), ensure_ascii=False).encode()
    assert bodies.parsed(api.ChatRequest, marked).max_tokens == 1
    commas = content({"type": "text", "text": "," * 100_000})
    assert bodies.parsed(api.ChatRequest, json.dumps(commas).encode()).max_tokens == 1


@pytest.mark.parametrize(
    "data",
    [b"\xff", b'{"messages": "\xed\xa0\x80"}', '{"messages": []}'.encode("utf-16"), b'{"a": NaN}'],
)
def test_bodies_that_are_not_json(http: httpx2.Client, data: bytes) -> None:
    error = error_of(http.post(CHAT, content=data, headers={"content-type": "application/json"}))
    assert "the body is not" in error["message"]


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_nesting_is_parsed_or_refused_at_every_depth(start: str, end: str) -> None:
    """Depths at the limit of the JSON parser, and of the check of characters after it."""
    errors = set()
    for depth in range(900, 1000):
        inner = start * depth + '"\\u0041"' + end * depth
        data = f'{{"messages": [{{"role": "user", "content": "x"}}], "metadata": {inner}}}'
        try:
            bodies.parsed(api.ChatRequest, data.encode())
        except ApiError as error:
            errors.add((error.status, error.message))
    assert errors == {(400, "the body is not JSON that can be meant: it is nested too deeply")}


def test_names_of_hosts_paths_and_methods_are_cut(http: httpx2.Client) -> None:
    long = "a" * 30_000
    for method, path, headers in (
        ("GET", f"/{long}", {}),
        ("GET", f"/v1/videos/{long}", {}),
        ("GET", f"/v1/models/{long}", {}),
        ("GET", "/health", {"host": long}),
        (long, "/health", {}),
    ):
        response = http.request(method, path, headers=headers)
        assert response.status_code in (403, 404, 405)
        assert len(response.json()["error"]["message"]) < 300


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"content": {"a": 1}}, "messages.0.content", "expected a string or a list, got {'a': 1}"),
        ({"content": [5]}, "messages.0.content.0", "expected an object, got 5"),
        ({"content": [{}]}, "messages.0.content.0", "with the field 'type'"),
        ({"content": [{"type": "image_url"}]}, "messages.0.content.0.image_url", "required"),
        (
            {"content": [{**IMAGE, "smell": 1}]},
            "messages.0.content.0.smell",
            "unknown or unsupported field",
        ),
        ({"content": [{**TEXT, "text": 3}]}, "messages.0.content.0.text", "expected a string"),
        ({"content": [{"type": "text"}]}, "messages.0.content.0.text", "required"),
        (
            {"content": [{"type": "image_url", "image_url": {"uri": "x", "url": "y"}}]},
            "messages.0.content.0.image_url.uri",
            "unknown or unsupported field",
        ),
        (
            {"content": [{"type": "image_url", "image_url": "x"}]},
            "messages.0.content.0.image_url",
            "expected an object, got 'x'",
        ),
    ],
)
def test_errors_use_the_terms_of_json_and_name_existing_fields(
    http: httpx2.Client, change: dict, param: str, message: str
) -> None:
    error = error_of(http.post(CHAT, json={"messages": [{"role": "user", **change}]}))
    assert error["param"] == param
    assert message in error["message"]
    assert "dictionary" not in error["message"]


def test_a_clip_given_as_a_picture_is_reported_in_terms_of_the_api(http: httpx2.Client) -> None:
    gif = data_uri(many_frames(3, 8), "image/gif")
    error = error_of(http.post(CHAT, json=asking({**IMAGE, "image_url": {"url": gif}})))
    assert "send it as `video_url`" in error["message"]
    assert "Video(" not in error["message"]
    video = {"type": "video_url", "video_url": {"url": gif}}
    assert http.post(CHAT, json=asking(video)).status_code == 200


@pytest.mark.parametrize(
    ("part", "like"),
    [
        ({"image_url": {"url": "DATA:IMAGE/PNG;BASE64," + base64.b64encode(PNG).decode()}}, IMAGE),
        (
            {"image_url": {"url": "data:image/png;base64, " + base64.encodebytes(PNG).decode()}},
            IMAGE,
        ),
        ({"input_audio": {"data": base64.encodebytes(WAV).decode()}}, AUDIO),
        ({"input_audio": {"data": data_uri(WAV, "audio/wav")}}, AUDIO),
        ({"input_audio": {"data": base64.urlsafe_b64encode(WAV).decode().rstrip("=")}}, AUDIO),
    ],
)
def test_base64_in_all_its_forms(http: httpx2.Client, part: dict, like: dict) -> None:
    kind = next(iter(part))
    answers = [
        http.post(CHAT, json=asking(TEXT, entry, seed=1, max_tokens=8, temperature=1.0)).json()
        for entry in (like, {"type": kind, **part})
    ]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"] == answers[1]["usage"]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"decoders": {"video": {"frames": 20_001}}}, "decoders.video.frames"),
        ({"decoders": {"image": {"steps": 10**400}}}, "decoders.image.steps"),
        (
            {"decoders": {"image": {"width": 10**4200, "height": 10**4200}}},
            "decoders.image: width x height",
        ),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"top_k": 10**400}, "top_k"),
        ({"decoders": {"video": {"frames": 497}}}, "decoders.video"),
        ({"seed": 2**70}, "seed"),
        ({"decoders": {"audio": {"seconds": 1e-9}}}, "decoders.audio"),
        ({"decoders": {"video": {"fps": 1e-9}}}, "decoders.video.fps"),
        ({"decoders": {"video": {"width": 32768, "height": 64}}}, "decoders.video"),
    ],
)
def test_numbers_at_the_edge_are_refused(http: httpx2.Client, options: dict, param: str) -> None:
    error = error_of(http.post(CHAT, json=asking(TEXT, **options)))
    assert error["param"] == param
    assert "expected at" in error["message"] or "than or equal to" in error["message"]


def test_default_frames_and_sizes_count_towards_the_output_limit(
    serve: Callable[..., Served],
) -> None:
    """Width x height x frames is limited, also where one of them is the decoder's default."""
    with serve(max_output_volume=1000).http() as http:
        for options in ({"width": 16, "height": 16}, {"frames": 9}):
            error = error_of(http.post(CHAT, json=asking(TEXT, decoders={"video": options})))
            assert "width x height x frames" in error["message"]


def test_a_tiny_temperature_is_greedy(http: httpx2.Client) -> None:
    cold, greedy = (
        http.post(CHAT, json=asking(TEXT, seed=1, temperature=value, max_tokens=8)).json()
        for value in (1e-38, 0)
    )
    assert cold["choices"][0]["message"]["content"] == greedy["choices"][0]["message"]["content"]


def test_the_decoders_own_size_is_accepted(http: httpx2.Client) -> None:
    """The decoder takes no size: its own is what it makes."""
    body = {"prompt": "x", "decoder": {"steps": 2}}
    assert http.post("/v1/images/generations", json={**body, "size": "16x16"}).status_code == 200
    error = error_of(http.post("/v1/images/generations", json={**body, "size": "64x64"}))
    assert error["param"] == "size"
    assert error["message"].startswith("size: ")
    assert "16x16" in error["message"]
    error = error_of(http.post("/v1/videos", json={"prompt": "x", "seconds": "4"}))
    assert error["param"] == "seconds"


# --- media that take long -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow() -> dict[str, Any]:
    """A clip of some 100 kB that takes minutes to decode, within all limits."""
    url = data_uri(many_frames(9000, 2000), "image/gif")
    return {"type": "video_url", "video_url": {"url": url}}


def test_a_clip_that_takes_too_long_is_refused(serve: Callable[..., Served], slow: dict) -> None:
    served = serve(input_limits=replace(ServerSettings().input_limits, decoding_seconds=0.5))
    with health_watched(served) as taken, served.http() as http:
        began = time.monotonic()
        error = error_of(http.post(CHAT, json=asking(slow)))
        assert time.monotonic() - began < 2 * PATIENCE
    assert error["param"] == "messages.0.content.0.video_url.url"
    assert error["code"] == "invalid_media"
    assert max(taken) < PATIENCE


@pytest.mark.parametrize("stays", [True, False])
def test_slow_clips_do_not_delay_other_requests(
    serve: Callable[..., Served], slow: dict, stays: bool
) -> None:
    """Neither those of clients that wait, nor of clients that disconnect at once."""
    served = serve(input_limits=replace(ServerSettings().input_limits, decoding_seconds=60.0))
    text = json.dumps(asking(slow)).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(text)}\r\n\r\n"
    )
    port = int(served.url.rpartition(":")[2])
    with ExitStack() as clients:
        for _ in range(6):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(head.encode() + text)
            clients.callback(client.close)
        time.sleep(0.5)
        if not stays:
            clients.close()
        with health_watched(served) as taken, served.http() as http:
            began = time.monotonic()
            assert http.post(CHAT, json=asking(IMAGE)).status_code == 200
            assert http.post(CHAT, json=asking(TEXT, AUDIO)).status_code == 200
            assert time.monotonic() - began < 3 * PATIENCE
        assert max(taken) < PATIENCE
    until = time.monotonic() + 30
    while served.service.parser.decoder.is_full("video"):
        assert time.monotonic() < until, "nobody waits, and they are still decoded"
        time.sleep(0.05)


def test_frames_are_read_once_and_the_answer_is_that_of_the_python_api(
    chat: Any, http: httpx2.Client
) -> None:
    from mmllm.conversation import Video, user

    clip = many_frames(9, 40)
    part = {"type": "video_url", "video_url": {"url": data_uri(clip, "image/gif")}}
    body = asking(part, TEXT, seed=4, temperature=1.0, max_tokens=8, modalities=["text"])
    answer = http.post(CHAT, json=body).json()
    forbidden = dict.fromkeys(("image", "audio", "video"), "forbid")
    reply = chat.reply(
        [user(Video(clip), TEXT["text"])],
        seed=4,
        temperature=1.0,
        max_new_tokens=8,
        modalities=forbidden,
    )
    assert answer["choices"][0]["message"]["content"] == reply.text
    nums = [encoder.num_frames for encoder in chat.model.encoders.values() if encoder.num_frames]
    given = Video(clip).presampled(nums, isolated.sample_frames)
    assert list(given.sampled) == nums  # pyright: ignore[reportAttributeAccessIssue]


def test_all_requests_share_what_their_media_may_take(serve: Callable[..., Served]) -> None:
    """One request alone is accepted; while another runs, it exceeds the limit."""
    served = serve(max_total_decoded_bytes=40)
    asked = asking(IMAGE, modalities={"image": "force"}, decoders={"image": {"steps": 200}})
    with served.http() as http, ThreadPoolExecutor(1) as pool:
        first = pool.submit(http.post, CHAT, json=asked)
        until = time.monotonic() + 30
        while not served.metric("mmllm_running"):
            assert time.monotonic() < until
            time.sleep(0.01)
        error = error_of(served.http().post(CHAT, json=asking(IMAGE)), 429)
        assert error["code"] == "busy"
        assert first.result().status_code == 200
        assert http.post(CHAT, json=asking(IMAGE)).status_code == 200


# --- connections --------------------------------------------------------------------------------


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=30)


def is_closed(client: socket.socket) -> bool:
    """Whether the server has closed it, without an answer."""
    try:
        return client.recv(4096) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nhost: local",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea",
    ],
)
def test_incomplete_headers_time_out(serve: Callable[..., Served], sent: bytes) -> None:
    served = serve(idle_timeout=0.5)
    with connect(served) as client:
        client.sendall(sent)
        if sent.endswith(b"/hea"):
            answer = client.recv(4096)
            while not answer.endswith(b"}"):  # head and body may arrive separately
                answer += client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        assert is_closed(client)
        assert time.monotonic() - began < 4 * PATIENCE


@pytest.mark.parametrize("head", [b"x" * 3_000_000, b"GET / HTTP/1.1\r\nx: " + b"y" * 3_000_000])
def test_a_client_that_is_still_sending_can_read_why_it_is_refused(
    served: Served, head: bytes
) -> None:
    """The server must not close a socket with unread bytes: TCP would reset the answer away."""
    for _ in range(5):
        with connect(served) as client:
            client.sendall(head)
            answer = b""
            while piece := client.recv(4096):
                answer += piece
            assert answer.startswith(b"HTTP/1.1 400")
            assert answer.endswith(b"Invalid HTTP request received.")


@pytest.mark.parametrize("limit", [{"linger_bytes": 100_000}, {"linger_timeout": 0.2}])
def test_a_client_that_never_stops_sending_is_disconnected(
    serve: Callable[..., Served], limit: dict[str, Any]
) -> None:
    served = serve(**limit)
    pause = 0.05 if "linger_timeout" in limit else 0.0

    def send_on(client: socket.socket) -> None:
        for _ in range(200):
            client.sendall(b"x" * 100_000)
            time.sleep(pause)

    with connect(served) as client, pytest.raises(ConnectionError):
        send_on(client)


def test_a_stalled_body_times_out(serve: Callable[..., Served]) -> None:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        "content-length: 9999\r\n\r\n"
    ).encode()
    served = serve(idle_timeout=0.5, max_requests=2)
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(served)) for _ in range(8)]
        for client in clients:
            client.sendall(head)
        with served.http() as http:  # they hold no place meanwhile
            assert http.post(CHAT, json=asking(TEXT)).status_code == 200
        for client in clients:
            assert client.recv(4096).startswith(b"HTTP/1.1 408")
    with connect(served) as client:  # a byte now and then is no body either
        client.sendall(head)
        began = time.monotonic()
        answer = b""
        client.settimeout(0.1)
        while not answer and time.monotonic() - began < 4 * PATIENCE:
            client.sendall(b" ")
            try:
                answer = client.recv(4096)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")


def test_the_idle_timeout_does_not_end_slow_responses(serve: Callable[..., Served]) -> None:
    served = serve(idle_timeout=0.2)
    body = asking(TEXT, modalities={"image": "force"}, decoders={"image": {"steps": 200}})
    with served.http() as http:
        assert http.post(CHAT, json=body).status_code == 200


def test_idle_connections_are_closed_for_new_ones(serve: Callable[..., Served]) -> None:
    served = serve(max_connections=4)
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(served)) for _ in range(4)]
        with served.http() as http:
            assert http.get("/health").status_code == 200
        assert is_closed(silent[0])


def test_unfinished_bodies_are_dropped_for_new_ones(serve: Callable[..., Served]) -> None:
    """Bodies share a limit of memory; the oldest unfinished one is dropped."""
    served = serve(max_total_body_bytes=300_000)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        "content-length: 250001\r\n\r\n"
    ).encode()
    with connect(served) as client, served.http() as http:
        client.sendall(head + b" " * 250_000)
        time.sleep(0.5)
        assert http.post(CHAT, json=asking(TEXT)).status_code == 200
        assert http.post(CHAT, json=asking(TEXT, x="y" * 200_000)).status_code == 400
        assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_its_response_times_out() -> None:
    async def answering(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def stuck(message: Any) -> None:
        await asyncio.sleep(3600)

    gate = AdmissionMiddleware(answering, ServerSettings(send_timeout=0.1, hosts=None), Metrics())
    scope = {"type": "http", "path": "/v1/models", "headers": []}
    with pytest.raises(TimeoutError):
        asyncio.run(gate(scope, receive, stuck))
    assert gate.num_admitted == 0
