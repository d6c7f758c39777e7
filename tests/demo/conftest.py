"""Sessions without a browser, a demo before the tiny model, and a browser to look at it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def browse() -> Iterator[Callable[..., Any]]:
    """`browse(width, height)`: a new page in Debian's Chromium, where no request leaves for
    another host and no error is logged."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "no browser: apt-get install chromium"
    flags = ["--disable-gpu", "--no-first-run"]
    flags += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    troubles: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)

        def page(width: int, height: int) -> Any:
            context = browser.new_context(viewport={"width": width, "height": height})
            context.set_default_timeout(60_000)  # milliseconds, on a busy machine
            page = context.new_page()
            page.on("request", lambda request: troubles.append(request.url))
            page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
            return page

        yield page
        browser.close()
    own = re.compile(r"(https?://127\.0\.0\.1:|data:|blob:)")
    assert [trouble for trouble in troubles if not own.match(trouble)] == []
