"""Before anything is parsed: which name was called, who calls, how many at once, how much; and at
the end: how it went and how long it took."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter
from typing import Any

from mmllm.server.errors import CLOSED, ApiError, told
from mmllm.server.metrics import Metrics
from mmllm.server.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = {"/health"}
"""Paths that need no token."""


class Gate:
    """ASGI middleware: refuses a request, or hands on its body, read whole and within limits."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics):
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._token = None if settings.token is None else f"bearer {settings.token}".encode()
        self._inside = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 0, perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._admit(scope, receive, watched)
        except Exception as error:
            if status:  # the answer has begun: all that is left is to break it off
                raise
            await told(error).response()(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(perf_counter() - began)

    async def _admit(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        self._check(scope["path"], headers)
        self._inside += 1
        try:
            body = await self._body(headers, receive)
            await self.app(scope, _again(body, receive), send)
        finally:
            self._inside -= 1

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        hosts = self.settings.hosts
        name = headers.get(b"host", b"").decode("latin-1").lower()
        name = name if name.endswith("]") else name.rsplit(":", 1)[0]
        if hosts is not None and name not in hosts:
            raise ApiError(
                403, f"Host {name!r}: this server answers to {', '.join(sorted(hosts))} only"
            )
        if self._token is not None and path not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(kind.lower() + b" " + given.strip(), self._token):
                raise ApiError(
                    401,
                    "a token is needed: send the header `Authorization: Bearer TOKEN` with the "
                    "one that the server was started with",
                    code="invalid_api_key",
                )
        if self._inside >= self.settings.requests and path not in OPEN:
            raise ApiError(429, "too many requests at once; try again soon", code="busy")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most = self.settings.body_bytes
        too_large = ApiError(
            413,
            f"the body has more than {most} bytes: send fewer or smaller media",
            code="body_too_large",
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLOSED, "the client went away")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            seconds = self.settings.body_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} s") from error


def _again(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what else comes: the client's going away."""
    parts = [body]

    async def read() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return read
