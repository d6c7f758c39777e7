"""An OpenAI-compatible endpoint, well and ill: every failure costs its call and no more."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mmllm.conversation import system, user
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny
from mmllm.reasoning import CallError, OpenAIModel
from mmllm.reasoning import endpoint as endpoint_module
from mmllm.server.app import build_app
from tests.samples import clip, picture, sound
from tests.server.conftest import running

PROMPT = [system("Be brief."), user("one two")]
Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class StubServer:
    """A server whose responses are taken from a list, the last one repeatedly."""

    def __init__(self, *answers: Answer):
        self.answers = list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.bodies.append(body)
                    stub.headers.append(dict(self.headers))
                    answers = stub.answers
                    answer = answers.pop(0) if len(answers) > 1 else answers[0]
                with contextlib.suppress(OSError):
                    answer(self, body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def sends(data: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def completes(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    choices = [
        {"message": {"role": "assistant", "content": f"{body['seed'] + number}"}}
        for number in range(body["n"])
    ]
    usage = {"prompt_tokens": 5, "completion_tokens": 2 * body["n"]}
    sends(json.dumps({"choices": choices, "usage": usage}).encode())(handler, body)


def drips(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Send a byte now and then, so that no single read times out."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def sleeps(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    time.sleep(2)


def hangs_up(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.close_connection = True


@pytest.fixture
def serve() -> Iterator[Callable[..., StubServer]]:
    servers: list[StubServer] = []

    def start(*answers: Answer) -> StubServer:
        servers.append(StubServer(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before retries, which are not waited for."""
    seconds: list[float] = []
    monkeypatch.setattr(endpoint_module.time, "sleep", seconds.append)
    return seconds


def test_it_asks_as_openai_documents_and_reads_the_answer(serve) -> None:
    server = serve(completes)
    model = OpenAIModel(server.url + "/", "m", api_key="secret", extra={"top_p": 0.9})
    found = model.complete(PROMPT, n=2, temperature=0.5, max_new_tokens=9, stop=["."], seed=4)
    assert [entry.text for entry in found] == ["4", "5"]
    assert [entry.prompt_tokens for entry in found] == [5, 0]
    assert [entry.completion_tokens for entry in found] == [2, 2]
    assert server.bodies == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "one two"},
            ],
            "temperature": 0.5,
            "max_tokens": 9,
            "stop": ["."],
            "top_p": 0.9,
            "n": 2,
            "seed": 4,
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_many_samples_are_several_requests_a_few_at_a_time(serve) -> None:
    active: list[int] = []
    counts: list[int] = []

    def slow(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        active.append(body["n"])
        counts.append(len(active))
        time.sleep(0.05)
        active.pop()
        completes(handler, body)

    server = serve(slow)
    model = OpenAIModel(server.url, "m", concurrency=2, samples_per_request=3)
    assert [entry.text for entry in model.complete(PROMPT, n=20)] == list(map(str, range(20)))
    assert sorted(body["n"] for body in server.bodies) == [2, *[3] * 6]
    assert max(counts) == 2


def test_media_are_sent_as_data_uris(serve) -> None:
    server = serve(completes)
    OpenAIModel(server.url, "m").complete([user("what?", picture(), sound(), clip())])
    content = server.bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "input_audio", "video_url"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert content[2]["input_audio"]["format"] == "wav"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sends(b"<html>busy</html>"), "expected a chat completion as JSON, got '<html>busy"),
        (sends(b""), "expected a chat completion"),
        (sends(b"[" * 100_000), "expected a chat completion"),
        (sends(b'{"choices": []}'), "expected a chat completion"),
        (sends(b'{"choices": [{"message": {"content": 3}}]}'), "expected a chat completion"),
        (sends(b'{"choices": {"a": 1}}'), "expected a chat completion"),
        (sends(b"null"), "expected a chat completion"),
        (sends(b'{"error": "no such model"}', 404), "HTTP status 404: .*no such model"),
        (sends(b"", 500), "HTTP status 500"),
        (sends(b"\xff\xfe", 401), "HTTP status 401"),
    ],
)
def test_garbage_and_http_errors_cost_one_request(serve, answer: Answer, message: str) -> None:
    server = serve(answer, completes)
    model = OpenAIModel(server.url, "m")
    with pytest.raises(CallError, match=message):
        model.complete(PROMPT)
    assert len(server.bodies) == 1
    assert model.complete(PROMPT)[0].text == "0"


@pytest.mark.parametrize("answer", [sleeps, drips])
def test_a_time_out_is_for_the_whole_answer_and_is_not_retried(serve, answer: Answer) -> None:
    server = serve(answer, completes)
    model = OpenAIModel(server.url, "m", timeout=0.3)
    start = time.monotonic()
    with pytest.raises(CallError, match=r"no answer within 0.3 s"):
        model.complete(PROMPT)
    assert time.monotonic() - start < 1.5
    assert len(server.bodies) == 1


def test_an_endless_answer_is_cut(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(sends(b"x" * (2**24 + 100)))
    with pytest.raises(CallError, match="the answer exceeds 16777216 bytes"):
        OpenAIModel(server.url, "m").complete(PROMPT)


def test_a_busy_server_is_asked_again_as_it_wishes(serve, pauses: list[float]) -> None:
    server = serve(sends(b"", 429, Retry_After="3"), sends(b"", 503), hangs_up, completes)
    assert OpenAIModel(server.url, "m").complete(PROMPT)[0].text == "0"
    assert pauses == [3.0, 1.0, 2.0]


def test_retries_are_bounded(serve, pauses: list[float]) -> None:
    server = serve(sends(b"busy", 503))
    with pytest.raises(CallError, match="HTTP status 503: 'busy'"):
        OpenAIModel(server.url, "m", retries=2).complete(PROMPT)
    assert len(server.bodies) == 3


def test_a_server_that_is_not_there_is_named(pauses: list[float]) -> None:
    with pytest.raises(CallError, match=r"127\.0\.0\.1:9/.*cannot be reached"):
        OpenAIModel("http://127.0.0.1:9/v1", "m", retries=1).complete(PROMPT)
    assert len(pauses) == 1


def test_what_came_of_several_requests_is_kept(serve) -> None:
    server = serve(completes, sends(b"", 500), completes)
    model = OpenAIModel(server.url, "m", samples_per_request=1, concurrency=1)
    assert len(model.complete(PROMPT, n=3)) == 2


def test_an_answer_without_usage_is_bounded_by_its_bytes(serve) -> None:
    server = serve(sends(b'{"choices": [{"message": {"content": "four"}}], "usage": null}'))
    model = OpenAIModel(server.url, "m")
    (found,) = model.complete(PROMPT)
    assert found.completion_tokens == 4
    assert found.prompt_tokens == model.count_tokens(PROMPT) >= len("Be brief.one two")


def test_likelihoods_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match='choose="written"'):
        OpenAIModel("http://x/v1", "m").score(PROMPT, ["a"])
    with pytest.raises(ConfigError, match="expected http"):
        OpenAIModel("ftp://x", "m")


def test_mmllm_serve_is_such_an_endpoint(tiny_model: AnyToAny) -> None:
    """The same samples from the chat itself and from its server."""
    chat = Chat(tiny_model)
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "max_new_tokens": 6, "seed": 5}
    with running(build_app(chat)) as served:
        model = OpenAIModel(f"{served.url}/v1", "tiny", extra={"modalities": ["text"]})
        found = model.complete([user("one two")], **options)
    assert found == chat.complete([user("one two")], **options)
