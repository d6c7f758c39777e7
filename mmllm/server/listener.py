"""A socket, and uvicorn on it."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmllm.errors import ConfigError
from mmllm.server.settings import ServerSettings

_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})


def allowed_hosts(host: str) -> frozenset[str] | None:
    """The names by which a server that listens on `host` may be called; None: any."""
    return _LOCAL if is_loopback(host) else None


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address that is free (port 0: any). Raises ConfigError for any other."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{host}:{port}: cannot listen there ({error}); choose another --host or --port"
        ) from error


def address(door: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = door.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_server(app: FastAPI, settings: ServerSettings | None = None) -> uvicorn.Server:
    """uvicorn for an app: `server(app).run(sockets=[door])` serves until Ctrl-C or SIGTERM."""
    allowed: ServerSettings = settings or app.state.service.settings

    class Limited(_LimitedProtocol):
        silent_seconds = allowed.idle_timeout
        most = allowed.max_connections

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Limited,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=5,
        )
    )


class _LimitedProtocol(H11Protocol):
    """HTTP/1.1 whose headers must come within `silent_seconds`: uvicorn itself waits for ever for
    their end. Beyond `most` connections the oldest one that waits for its client is closed. (How
    long a body may take is the gate's to say.)"""

    silent_seconds: float
    most: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        self._deadline: asyncio.TimerHandle | None = None
        self._began = self.loop.time()
        super().connection_made(transport)
        self._await_headers()
        if len(self.connections) > self.most:
            waiting = [
                one
                for one in self.connections
                if isinstance(one, _LimitedProtocol) and one is not self and one.awaits_client
            ]
            if waiting:
                min(waiting, key=lambda one: one._began).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answers:
            self._headers_came()
        elif self._deadline is None:  # the beginning of another request
            self._await_headers()

    @property
    def awaits_client(self) -> bool:
        """Whether it is the client's turn to send something."""
        return not self._answers or self.cycle.more_body

    @property
    def _answers(self) -> bool:
        """Whether the headers of a request are there whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_headers(self) -> None:
        self._deadline = self.loop.call_later(self.silent_seconds, self._give_up)

    def _headers_came(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self._answers:
            self.transport.abort()
