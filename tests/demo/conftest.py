"""Sessions without a browser, and a demo before the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mmllm.demo import Demo
from mmllm.demo.sessions import SessionStore
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny


@pytest.fixture
def sessions(tmp_path: Path) -> SessionStore:
    (tmp_path / "demo").mkdir()
    return SessionStore(tmp_path / "demo", expires=3600)


@pytest.fixture
def demo(tiny_model: AnyToAny) -> Iterator[Demo]:
    with Demo(Chat(tiny_model), card="# How it was trained\nNot at all.") as demo:
        yield demo
