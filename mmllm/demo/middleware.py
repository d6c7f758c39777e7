"""Admission of requests before Gradio: host, origin, path and size of the body.

A web page anywhere may send requests to this machine. Its browser says so: by `Sec-Fetch-Site`
where the demo is called by a name that is trusted (localhost), by `Origin` elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import PlainTextResponse

from mmllm.demo.sessions import SessionStore
from mmllm.errors import quoted

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

API = "/gradio_api/"
UPLOAD = f"{API}upload"
CLOSED = (
    *("proxy=", "file=http", "file/", "dev/", "deep_link", "process_recording", "component_server"),
    *("vibe-", "undo-vibe-", "run-history", "runs", "custom_component", "profiling"),
)
"""Paths of Gradio's API that the page has no use for: they fetch from other hosts, write files, or
run programs."""

_MAX_UPLOAD = 96 * 2**20
"""Most bytes of an upload, of all its files."""
_MAX_BODY = 2**20
"""Most bytes of any other request."""
_TOGETHER = 8
"""Most concurrent uploads."""
_IDLE = 30.0
"""Timeout in seconds for the next chunk of a body."""


class RequestRefused(Exception):
    """A refused request: HTTP status and message."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class OriginMiddleware:
    """ASGI middleware of the demo. `hosts`: names by which it may be called (the Host header; None:
    any), so that a page whose name resolves to 127.0.0.1 is refused, as by the server."""

    def __init__(self, app: App, hosts: frozenset[str] | None, sessions: SessionStore):
        self.app = app
        self.hosts = hosts
        self.sessions = sessions
        self._uploads = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RequestRefused as refusal:
            answer = PlainTextResponse(str(refusal), refusal.status, {"connection": "close"})
            await answer(scope, receive, send)
            return
        if not scope["path"].startswith(UPLOAD) or scope["method"] != "POST":
            await self.app(scope, _within(_IDLE, receive), send)
            return
        self._uploads += 1
        try:
            await self.app(scope, _within(_IDLE, receive), send)
        finally:
            self._uploads -= 1
            await asyncio.shield(asyncio.to_thread(self.sessions.sweep))

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers = {
            name.lower().decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self.hosts is not None and name not in self.hosts:
            known = ", ".join(sorted(self.hosts))
            raise RequestRefused(403, f"Host {quoted(name)}: this demo answers to {known} only")
        if not _own(scope["method"], scope["path"], headers):
            raise RequestRefused(
                403, "this demo answers to its own page only, not to one of another site"
            )
        path = scope["path"]
        if path.startswith(API) and path.removeprefix(API).startswith(CLOSED):
            raise RequestRefused(403, "this demo does not do that")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            self._check_body(path, headers)

    def _check_body(self, path: str, headers: dict[str, str]) -> None:
        length = headers.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in headers:
            raise RequestRefused(411, "the request needs a content-length header")
        most = _MAX_UPLOAD if path.startswith(UPLOAD) else _MAX_BODY
        if len(length) > 15 or int(length) > most:
            raise RequestRefused(
                413, f"more than {most} bytes at once: send fewer or smaller files"
            )
        if path.startswith(UPLOAD) and self._uploads >= _TOGETHER:
            raise RequestRefused(429, "too many files are being sent at once; try again soon")


def _own(method: str, path: str, headers: dict[str, str]) -> bool:
    """Return whether a request comes from the demo's page, from no page, or only opens the demo."""
    site = headers.get("sec-fetch-site")
    if site in ("same-origin", "none"):
        return True
    if site is not None:  # a link to the demo, or a notebook on this machine that shows it
        opens = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        alone = site == "same-site" or headers.get("sec-fetch-dest") == "document"
        return opens and alone and not path.startswith(API)
    origin = headers.get("origin")
    names = (headers.get("host"), headers.get("x-forwarded-host"))  # no foreign page sets these
    return origin is None or origin.lower().partition("://")[2] in {
        name.lower() for name in names if name
    }


def _within(seconds: float, receive: Receive) -> Receive:
    """Return a `receive` that reports a disconnect if the next chunk of a body is late."""
    coming = True

    async def read() -> Message:
        nonlocal coming
        if not coming:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), seconds)
        except TimeoutError:
            message = {"type": "http.disconnect"}
        coming = message.get("more_body", False)
        return message

    return read
