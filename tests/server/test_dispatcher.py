"""One engine for all requests: shared batches, cancelling, the bounded queue, shutdown."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mmllm.conversation import user
from mmllm.decoders.contract import Cancelled
from mmllm.errors import ContextError
from mmllm.inference.chat import Chat
from mmllm.server.dispatcher import Dispatcher, ReplyJob, ReplyOptions
from mmllm.server.errors import ApiError
from mmllm.server.metrics import Metrics
from mmllm.server.settings import ServerSettings
from tests.server.conftest import Served

LONG = {"image": {"steps": 200}}
PICTURE = {"image": "force", "audio": "forbid", "video": "forbid"}


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


@contextmanager
def sent(served: Served, asked: dict[str, Any]) -> Iterator[None]:
    """A request of a client that disconnects at the end of the block."""
    text = json.dumps(asked).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    )
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + text)
        yield


def body(text: str, **options: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": text}],
        "temperature": 1.0,
        "max_tokens": 8,
        **options,
    }


def test_concurrent_requests_share_steps_and_equal_single_ones(
    chat: Chat, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed or not, with options of their own, and each leaves when it is done."""
    sizes: list[int] = []
    forward = chat.model.llm.forward

    def counted(embeds: torch.Tensor, **rest: Any) -> torch.Tensor:
        sizes.append(len(embeds))
        time.sleep(0.01)
        return forward(embeds, **rest)

    monkeypatch.setattr(chat.model.llm, "forward", counted)
    served = serve(max_batch=4)
    asked = [
        body(text, seed=seed, modalities=["text"], max_tokens=40, temperature=heat, stream=stream)
        for seed, (text, heat, stream) in enumerate(
            [
                ("one", 1.0, False),
                ("two three", 2.0, True),
                ("four", 0.0, False),
                ("six", 1.5, True),
            ]
        )
    ]

    def ask(one: dict[str, Any]) -> str:
        with served.http() as http:
            response = http.post("/v1/chat/completions", json=one)
        if not one["stream"]:
            return response.json()["choices"][0]["message"]["content"]
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        chunks = [json.loads(line) for line in lines if line != "[DONE]"]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, asked))
    assert max(sizes) > 1
    assert chat.engine.is_idle
    monkeypatch.undo()
    forbidden = dict.fromkeys(("image", "audio", "video"), "forbid")
    tokens = 0
    for one, answer in zip(asked, answers, strict=True):
        reply = chat.reply(
            [user(one["messages"][0]["content"])],
            seed=one["seed"],
            temperature=one["temperature"],
            max_new_tokens=40,
            modalities=forbidden,
        )
        assert answer == reply.text
        tokens += reply.usage.text
    assert len(sizes) < tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_the_engine(
    serve: Callable[..., Served], stream: bool
) -> None:
    served = serve()
    asked = body("draw", modalities=PICTURE, decoders=LONG, stream=stream)
    with served.http() as http:
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=asked) as response:
                lines = response.iter_lines()
                assert any("progress" in line for line in lines)
        else:
            with sent(served, asked):
                wait_for(lambda: served.metric("mmllm_running") == 1)
        wait_for(lambda: served.metric("mmllm_cancelled_total") == 1)
        wait_for(lambda: served.metric("mmllm_running") == 0)
        assert served.service.dispatcher.chat.engine.is_idle
        assert served.metric("mmllm_media_total", modality="image") == 0
        assert http.post("/v1/chat/completions", json=body("one")).status_code == 200
        assert http.get("/health").json() == {"status": "ok", "waiting": 0}


def test_the_queue_is_bounded(serve: Callable[..., Served]) -> None:
    served = serve(max_batch=1, max_queued=1, max_videos=2)
    with served.http() as http:
        job = {"prompt": "a rocket", "decoder": {"steps": 200}}
        first = http.post("/v1/videos", json=job).json()
        wait_for(lambda: http.get(f"/v1/videos/{first['id']}").json()["status"] == "in_progress")
        early = http.get(f"/v1/videos/{first['id']}/content")
        assert (early.status_code, early.json()["error"]["code"]) == (409, "not_ready")
        second = http.post("/v1/videos", json=job).json()
        assert second["status"] == "queued"

        busy = http.post("/v1/chat/completions", json=body("one"))
        assert (busy.status_code, busy.json()["error"]["code"]) == (429, "queue_full")
        assert busy.headers["retry-after"] == "1"
        more = http.post("/v1/videos", json=job)
        assert (more.status_code, more.json()["error"]["code"]) == (429, "too_many_videos")

        for entry in (second, first):
            assert http.delete(f"/v1/videos/{entry['id']}").json()["deleted"]
        assert http.post("/v1/chat/completions", json=body("one")).status_code == 200
    assert served.metric("mmllm_cancelled_total") == 2


def test_clips_are_deleted_after_the_retention_period(serve: Callable[..., Served]) -> None:
    with serve(retention_seconds=0.0).http() as http:
        key = http.post("/v1/videos", json={"prompt": "a rocket"}).json()["id"]
        wait_for(lambda: http.get(f"/v1/videos/{key}").status_code == 404)


def test_too_many_connections_are_refused_with_a_reason(serve: Callable[..., Served]) -> None:
    served = serve(max_requests=1)
    asked = body("draw", modalities=PICTURE, decoders=LONG, stream=True)
    with (
        served.http() as http,
        http.stream("POST", "/v1/chat/completions", json=asked) as response,
    ):
        assert response.status_code == 200
        assert served.http().get("/v1/models").status_code == 429
        assert served.http().get("/health").status_code == 200


def test_an_error_in_one_request_does_not_affect_the_others(chat: Chat) -> None:
    """A conversation that does not fit fails alone."""
    engine = Dispatcher(chat, ServerSettings(max_batch=3), Metrics())
    options = ReplyOptions(sampling={"max_new_tokens": 4})
    jobs = [ReplyJob([user(text)], options, 0) for text in ("one", "two " * 999, "three")]
    engine.start()
    try:
        for job in jobs:
            engine.submit(job)
        (reply,) = jobs[0].replies.result(60)
        assert reply.text == chat.reply([user("one")], seed=0, max_new_tokens=4).text
        with pytest.raises(ContextError):
            jobs[1].replies.result(60)
        assert jobs[2].replies.result(60)[0].usage.prompt > 0
    finally:
        engine.close()
    with pytest.raises(ApiError, match="shutting down"):
        engine.submit(ReplyJob([user("one")], options, 0))


def test_closing_cancels_running_and_queued_requests(chat: Chat) -> None:
    engine = Dispatcher(chat, ServerSettings(max_batch=1), Metrics())
    slow = ReplyOptions(modalities=PICTURE, decoders=LONG)
    running, waiting = (ReplyJob([user("draw")], slow, 0) for _ in range(2))
    began = threading.Event()
    running.on_event = lambda _: began.set()
    engine.start()
    engine.submit(running)
    assert began.wait(60)
    engine.submit(waiting)
    engine.close()
    assert waiting.replies.cancelled()
    with pytest.raises(Cancelled):
        running.replies.result(0)


def test_a_short_prompt_in_a_batch_with_a_long_one_is_not_cut_short(chat: Chat) -> None:
    """The context's limit holds for each conversation by itself."""
    conversations = [[user("one")], [user("one two three four " * 9)]]
    forbidden = dict.fromkeys(("image", "audio", "video"), "forbid")
    options: dict[str, Any] = {"max_new_tokens": 250, "temperature": 2.0, "modalities": forbidden}
    alone = [chat.reply(entry, seed=5, **options) for entry in conversations]
    assert alone[1].usage.prompt + alone[1].usage.text <= chat.model.llm.max_length
    together = chat.reply_many(conversations, seeds=[5, 5], **options)
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]
