"""A socket, and uvicorn on it."""

from __future__ import annotations

import ipaddress
import socket

import uvicorn
from fastapi import FastAPI

from mmllm.errors import ConfigError

_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})


def hosts_of(host: str) -> frozenset[str] | None:
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


def server(app: FastAPI) -> uvicorn.Server:
    """uvicorn for an app: `server(app).run(sockets=[door])` serves until Ctrl-C or SIGTERM."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=5,
        )
    )
