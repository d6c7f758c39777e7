"""URLs: off unless allowed, public hosts only, the address that was checked, no redirects."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mmllm.server import remote
from mmllm.server.errors import ApiError
from mmllm.server.settings import INPUT_LIMITS, ServerSettings
from tests.server.conftest import Served
from tests.server.files import PNG


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # where clouds keep their keys
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_addresses(address: str, public: bool) -> None:
    assert remote.is_public(address) is public


def fetched(url: str, *, hosts: set[str], **changes: Any) -> bytes:
    settings = replace(ServerSettings(allow_urls=frozenset(hosts)), **changes)
    return asyncio.run(remote.fetch(url, settings, "url"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://other.example/x.png", "not one that this server may fetch"),
        ("http://media.example:81/x.png", "not one that this server may fetch"),
        ("http://media.example.evil.example/", "not one that this server may fetch"),
        ("http://media.example@evil.example/", "user name"),
        ("http://user:word@media.example/", "user name"),
        ("http://[::1]/", "not one that this server may fetch"),
        ("ftp://media.example/x.png", "http"),
        ("file:///etc/passwd", "http"),
        ("http://", "not one that this server may fetch"),
        ("http://media.example\\@evil.example/", "url:"),
        ("http://media.example:99999/", "not one that"),
        ("http://media.example/\r\nx: y", "http"),
    ],
)
def test_urls_that_are_not_looked_up(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> list:
        raise AssertionError("looked up")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    with pytest.raises(ApiError, match=message) as caught:
        fetched(url, hosts={"media.example"})
    assert (caught.value.status, caught.value.param) == (400, "url")


def test_nothing_is_fetched_unless_allowed() -> None:
    with pytest.raises(ApiError, match="send the medium as a data: URI"):
        fetched("https://media.example/x.png", hosts=set())


@pytest.mark.parametrize("url", ["http://localhost/x", "http://127.0.0.1/x", "http://2130706433/x"])
def test_private_addresses_are_refused_even_if_allowed_by_name(url: str) -> None:
    with pytest.raises(ApiError, match="not on the public internet"):
        fetched(url, hosts={"localhost", "127.0.0.1", "2130706433"})


def test_all_addresses_of_a_host_must_be_public(resolve: Callable[..., list]) -> None:
    resolve("93.184.216.34", "10.0.0.1")
    with pytest.raises(ApiError, match="not on the public internet"):
        fetched("http://media.example/x.png", hosts={"media.example"})


# --- with a server that plays the public internet -----------------------------------------------


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """`resolve(address, …)`: media.example is there; the list of look-ups grows."""

    def change(*addresses: str) -> list[str]:
        asked: list[str] = []

        def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list:
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return asked

    return change


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """("media.example:PORT", what it was asked). Its address counts as public, and no other."""
    seen: list[tuple[str, str]] = []

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["host"]))
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("location", "/x.png")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            if self.path == "/slow":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            self.wfile.write(PNG if self.path == "/x.png" else b"x" * 10_000)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    yield f"media.example:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_the_connection_goes_to_the_address_that_was_checked(
    site: tuple[str, list], resolve: Callable[..., list]
) -> None:
    host, seen = site
    asked = resolve("127.0.0.1")
    assert fetched(f"http://{host}/x.png", hosts={host}) == PNG
    assert seen == [("/x.png", host)]
    assert asked.count("media.example") == 1, "a second look-up could give another address"


def test_redirects_large_files_and_slow_sites_are_refused(
    site: tuple[str, list], resolve: Callable[..., list]
) -> None:
    host, seen = site
    resolve("127.0.0.1")
    with pytest.raises(ApiError, match="302, not 200"):
        fetched(f"http://{host}/moved", hosts={host})
    assert seen == [("/moved", host)]
    with pytest.raises(ApiError, match="more than 5000 bytes"):
        fetched(
            f"http://{host}/large", hosts={host}, input_limits=replace(INPUT_LIMITS, bytes=5000)
        )
    began = time.monotonic()
    with pytest.raises(ApiError, match="not read within 1 s"):
        fetched(f"http://{host}/slow", hosts={host}, fetch_timeout=1.0)
    assert time.monotonic() - began < 8


def test_an_image_url_is_fetched(site: tuple[str, list], serve: Callable[..., Served]) -> None:
    host = site[0].replace("media.example", "localhost")
    served = serve(allow_urls=frozenset({host}))
    image = {"type": "image_url", "image_url": {"url": f"http://{host}/x.png"}}
    body = {"messages": [{"role": "user", "content": [image]}], "max_tokens": 2}
    with served.http() as http:
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        image["image_url"]["url"] = f"http://{host}/large"
        error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["code"] == "invalid_media"
