"""Admission of requests before anything is parsed: host, token, concurrency and size of the body.

Records the status and the duration of each request.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from mmllm.errors import quoted
from mmllm.server import generated_files
from mmllm.server.errors import CLOSED, ApiError, to_api_error
from mmllm.server.metrics import Metrics
from mmllm.server.settings import ServerSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = {"/", "/docs", "/health"}
"""Paths that need no token, besides generated files, whose names are secrets themselves."""
_ALWAYS = "/health"
"""The path that is answered however many requests are in progress."""
_SMALL = 2**16
"""Bytes up to which a body does not count against the total."""


class AdmissionMiddleware:
    """ASGI middleware that refuses a request or passes on its whole body, within limits."""

    def __init__(self, app: App, settings: ServerSettings, metrics: Metrics):
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._token = None if settings.token is None else f"bearer {settings.token}".encode()
        self.num_admitted = 0  # requests that are being answered
        self._bodies = _Bodies(settings.max_total_body_bytes)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 0, perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            async with asyncio.timeout(self.settings.send_timeout):
                await send(message)  # waits until what was sent before has been taken

        try:
            await self._admit(scope, receive, watched)
        except Exception as error:
            if status:  # the response has begun and can only be aborted
                raise
            await to_api_error(error).response()(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(perf_counter() - began)

    async def _admit(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        self._check(scope["path"], headers)
        with self._bodies.one() as held:
            body = await self._body(headers, receive, held)
            self._check_capacity(
                scope["path"]
            )  # checked again: a body being received takes no slot
            self.num_admitted += 1
            try:
                await self.app(scope, _again(body, receive), send)
            finally:
                self.num_admitted -= 1

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        hosts = self.settings.hosts
        name = headers.get(b"host", b"").decode("latin-1").lower()
        name = name if name.endswith("]") else name.rsplit(":", 1)[0]
        if hosts is not None and name not in hosts:
            raise ApiError(
                403,
                f"Host {quoted(name)}: this server answers to {', '.join(sorted(hosts))} only",
            )
        if self._token is not None and not _is_open(path):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(kind.lower() + b" " + given.strip(), self._token):
                raise ApiError(
                    401,
                    "a token is needed: send the header `Authorization: Bearer TOKEN` with the "
                    "one that the server was started with",
                    code="invalid_api_key",
                )
        self._check_capacity(path)

    def _check_capacity(self, path: str) -> None:
        if self.num_admitted >= self.settings.max_requests and path != _ALWAYS:
            raise ApiError(429, "too many requests at once; try again soon", code="busy")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, held: _Body) -> bytes:
        """Read the whole body within the limits of size, time and minimum rate."""
        settings = self.settings
        most = settings.max_body_bytes
        too_large = ApiError(
            413,
            f"the body has more than {most} bytes: send fewer or smaller media",
            code="body_too_large",
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(None) as held.timeout:
                while True:
                    now = loop.time()
                    expected = settings.idle_timeout + len(body) / settings.min_body_rate
                    until = began + min(settings.max_body_seconds, expected)
                    held.timeout.reschedule(min(until, now + settings.idle_timeout))
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLOSED, "the client went away")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    self._bodies.grow(held, len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            seconds = loop.time() - began
            raise ApiError(
                408,
                f"the body did not arrive in time: {len(body)} bytes in {seconds:.3g} s; send it "
                "without a pause, or less",
            ) from error
        finally:
            held.timeout = None


def _is_open(path: str) -> bool:
    return path in OPEN or (
        path.startswith(generated_files.PATH)
        and generated_files.is_name(path.removeprefix(generated_files.PATH))
    )


class _Body:
    """The bytes of one request's body. `timeout`: the timer while it is received."""

    def __init__(self) -> None:
        self.size = 0
        self.timeout: asyncio.Timeout | None = None


class _Bodies:
    """The bodies of all requests, which share `most` bytes. When they run out, the request that has
    been received for longest is dropped."""

    def __init__(self, most: int):
        self._most = most
        self._all: dict[_Body, None] = {}  # in order of arrival

    @contextmanager
    def one(self) -> Iterator[_Body]:
        body = _Body()
        self._all[body] = None
        try:
            yield body
        finally:
            self._all.pop(body, None)

    def grow(self, body: _Body, size: int) -> None:
        """Record that a body has `size` bytes by now. Raises ApiError (429) if they are too many
        and no other request can be dropped."""
        body.size = size
        while sum(other.size for other in self._all) > self._most:
            if size <= _SMALL:  # small bodies are always admitted
                return
            slow = [one for one in self._all if one.size and one.timeout and one is not body]
            if not slow:
                raise ApiError(429, "too many large requests at once; try again soon", code="busy")
            timeout, slow[0].size = slow[0].timeout, 0
            assert timeout is not None
            timeout.reschedule(0.0)  # in the past by the loop's clock, so it expires at once


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body in one message, then later ones (the disconnect)."""
    parts = [body]

    async def read() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return read
