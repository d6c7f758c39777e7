"""The listening socket, and uvicorn with limits on its connections."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmllm.errors import ConfigError
from mmllm.server.settings import ServerSettings

_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


def allowed_hosts(host: str) -> frozenset[str] | None:
    """The Host headers that a server listening on `host` accepts; None accepts any."""
    return _LOOPBACK_HOSTS if is_loopback(host) else None


def is_loopback(host: str) -> bool:
    """Return whether `host` is a loopback address, which only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Args:
        host: An IPv4 or IPv6 address, or a name.
        port: 0 takes any free port.

    Raises:
        ConfigError: The address is taken or cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{host}:{port}: cannot listen there ({error}); choose another --host or --port"
        ) from error


def address(listening: socket.socket) -> str:
    """The URL of a listening socket: `http://127.0.0.1:8000`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_server(app: FastAPI, settings: ServerSettings | None = None) -> uvicorn.Server:
    """A uvicorn server for an app of `build_app`.

    `uvicorn_server(app).run(sockets=[listen(host, port)])` serves until Ctrl-C or SIGTERM.
    """
    limits: ServerSettings = settings or app.state.service.settings

    class Protocol(_LimitedProtocol):
        settings = limits

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=5,
        )
    )


class _LimitedProtocol(H11Protocol):
    """HTTP/1.1 with limits that uvicorn does not have.

    - The head of a request must arrive within `settings.idle_timeout`; uvicorn waits for ever.
    - Beyond `settings.max_connections`, the oldest connection that waits for its client is closed.
    - A connection that is closed while its client may be sending lingers (_LingeringTransport).

    How long a body may take is checked by AdmissionMiddleware.
    """

    settings: ServerSettings

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._opened_at = self.loop.time()
        self._lingering = _LingeringTransport(transport, self)
        super().connection_made(self._lingering)  # pyright: ignore[reportArgumentType]
        self._start_head_timer()
        if len(self.connections) > self.settings.max_connections:
            waiting = [
                other
                for other in self.connections
                if isinstance(other, _LimitedProtocol)
                and other is not self
                and other.waits_for_client
            ]
            if waiting:
                min(waiting, key=lambda other: other._opened_at).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._lingering.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingering.is_lingering:
            self._lingering.discard(len(data))
            return
        super().data_received(data)
        if self._is_responding:
            self._stop_head_timer()
        elif self._head_timer is None:  # the first bytes of another request
            self._start_head_timer()

    @property
    def waits_for_client(self) -> bool:
        """Whether the next bytes on this connection must come from the client."""
        return not self._is_responding or self.cycle.more_body

    @property
    def may_receive_more(self) -> bool:
        """Whether the client may be in the middle of sending a request."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    @property
    def _is_responding(self) -> bool:
        """Whether a request's head has arrived and its response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.settings.idle_timeout, self._head_timed_out)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timed_out(self) -> None:
        self._head_timer = None
        if not self._is_responding:
            self.transport.abort()


class _LingeringTransport:
    """A transport whose `close` lets the client read the response first.

    Closing a socket that holds unread bytes makes TCP reset the connection, and the client loses
    the response (a 400 for a head that is too long, sent while the rest of it is on its way). So
    `close` sends FIN, then reads and discards until the client closes, within
    `settings.linger_bytes` and `settings.linger_timeout`. Everything else is passed through.
    """

    def __init__(self, transport: asyncio.Transport, protocol: _LimitedProtocol):
        self._transport = transport
        self._protocol = protocol
        self._timer: asyncio.TimerHandle | None = None
        self._bytes_left = protocol.settings.linger_bytes
        self.is_lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.is_lingering or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        transport = self._transport
        if self.is_closing():
            return
        if not self._protocol.may_receive_more or not transport.can_write_eof():
            transport.close()
            return
        self.is_lingering = True
        self._protocol.flow.resume_reading()
        transport.write_eof()
        loop, seconds = self._protocol.loop, self._protocol.settings.linger_timeout
        self._timer = loop.call_later(seconds, transport.close)

    def discard(self, num_bytes: int) -> None:
        """Count bytes that arrived after the response; close when there are too many."""
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            self._transport.close()

    def stop(self) -> None:
        """Cancel the timer of a connection that is lost."""
        if self._timer is not None:
            self._timer.cancel()
