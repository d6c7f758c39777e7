"""Which requests the demo admits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.responses import PlainTextResponse

from mmllm.demo import Demo
from mmllm.demo.middleware import OriginMiddleware
from mmllm.demo.sessions import SessionStore
from mmllm.server.listener import allowed_hosts


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/", {"host": "localhost:80"}, 200),
        ("GET", "/", {"host": "evil.example"}, 403),
        ("GET", "/", {"host": "127.0.0.1.evil.example:7860"}, 403),
        ("GET", "/", {"host": ""}, 403),
        ("GET", "/config", {"host": "evil.example"}, 403),
        ("POST", "/gradio_api/upload", {"host": "evil.example"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "http://evil.example"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "null"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "http://127.0.0.1:1"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "http://["}, 403),
        ("POST", "/gradio_api/upload", {"sec-fetch-site": "cross-site"}, 403),
        ("POST", "/gradio_api/upload", {"sec-fetch-site": "same-site"}, 403),
        ("POST", "/gradio_api/queue/join", {"origin": "http://evil.example"}, 403),
        ("OPTIONS", "/gradio_api/upload", {"origin": "http://evil.example"}, 403),
        ("GET", "/gradio_api/info", {"sec-fetch-site": "cross-site"}, 403),
        (
            "GET",
            "/",
            {
                "sec-fetch-site": "cross-site",
                "sec-fetch-mode": "navigate",
                "sec-fetch-dest": "document",
            },
            200,
        ),
        (
            "GET",
            "/",
            {
                "sec-fetch-site": "cross-site",
                "sec-fetch-mode": "navigate",
                "sec-fetch-dest": "iframe",
            },
            403,
        ),
        ("POST", "/gradio_api/upload", {"content-length": str(10**9)}, 413),
        ("POST", "/gradio_api/queue/join", {"content-length": str(2 * 10**6)}, 413),
        ("POST", "/gradio_api/upload", {"transfer-encoding": "chunked"}, 411),
        ("GET", "/gradio_api/proxy=http://example.org", {}, 403),
        ("GET", "/gradio_api/file=http://example.org/a.png", {}, 403),
        ("GET", "/gradio_api/file/http://example.org/a.png", {}, 403),
        ("POST", "/gradio_api/process_recording", {"content-length": "0"}, 403),
        ("GET", "/gradio_api/deep_link?session_hash=x", {}, 403),
    ],
)
def test_the_demo_answers_to_its_own_page_only(
    sessions: SessionStore, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    async def page(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("the page")(scope, receive, send)

    sent_messages: list[Any] = []

    async def send(message: Any) -> None:
        sent_messages.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    given = {"host": "127.0.0.1:7860", "content-length": "0", **headers}
    pairs = [(name.encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(OriginMiddleware(page, allowed_hosts("127.0.0.1"), sessions)(scope, receive, send))
    assert sent_messages[0]["status"] == status
    if status != 200:
        assert re.fullmatch(rb"[ -~]{10,200}", sent_messages[1]["body"])


def upload(demo: Demo, *files: bytes, **headers: str) -> tuple[int, str]:
    """Send files as the page does; (status, answer)."""
    url = urlsplit(demo.url)
    assert url.hostname
    head = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'
    body = b"".join(head + file + b"\r\n" for file in files) + b"--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    headers = {"content-type": kind, "origin": demo.url.rstrip("/"), **headers}
    with contextlib.closing(HTTPConnection(url.hostname, url.port, timeout=60)) as connection:
        connection.request("POST", "/gradio_api/upload", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def stored(demo: Demo) -> set[Path]:
    """The files in the demo's folder."""
    return {path for path in demo.sessions.root.rglob("*") if path.is_file()}


def test_unused_uploads_are_bounded(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    own = stored(demo)  # the images of the start page
    assert upload(demo, b"x", host="evil.example")[0] == 403
    assert upload(demo, b"x", origin="http://evil.example")[0] == 403
    assert stored(demo) == own
    monkeypatch.setattr("mmllm.demo.sessions.MAX_UPLOADED", 10_000)
    for number in range(20):
        status, answer = upload(demo, bytes([number]) * 1000, bytes([number, 1]) * 500)
        assert status == 200
    time.sleep(0.5)  # the sweep follows the answer
    files = stored(demo) - own
    assert 0 < sum(path.stat().st_size for path in files) <= 10_000
    assert own <= stored(demo)
    (newest, _) = json.loads(answer)
    assert Path(newest).read_bytes() == bytes([19]) * 1000
