"""A real uvicorn on a free port of this machine, before the tiny model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx2
import openai
import pytest
from fastapi import FastAPI

from mmllm import config, model
from mmllm.inference.chat import Chat
from mmllm.server import listener
from mmllm.server.app import Service, build_app
from mmllm.server.settings import ServerSettings


@dataclass
class Served:
    """A running server: its address, and the app for a look inside."""

    url: str
    app: FastAPI

    @property
    def service(self) -> Service:
        return self.app.state.service

    def http(self, **options: object) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            http_client=httpx2.Client(trust_env=False, timeout=60),
        )

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def running(app: FastAPI) -> Iterator[Served]:
    listening = listener.listen("127.0.0.1", 0)
    server = listener.uvicorn_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield Served(listener.address(listening), app)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="package")
def chat(system_tree: dict) -> Chat:
    return Chat(model.build(config.parse_system(system_tree), seed=0).eval())


@pytest.fixture(scope="package")
def served(chat: Chat) -> Iterator[Served]:
    """One server with default settings, shared by all tests that need no others."""
    with running(build_app(chat, ServerSettings())) as server:
        yield server


@pytest.fixture
def serve(chat: Chat) -> Iterator[Callable[..., Served]]:
    """`serve(token="x")`: a server with these settings."""
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(
            running(build_app(chat, ServerSettings(**changes)))
        )


@pytest.fixture
def http(served: Served) -> Iterator[httpx2.Client]:
    with served.http() as client:
        yield client


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.openai() as client:
        yield client
