"""One tiny system on disk for the whole session; a fresh model of it for each test that asks."""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import second_device  # isort: skip - it has to come before mmllm
from mmllm import config, model
from mmllm.kernels.backend import ENVIRONMENT_VARIABLE
from mmllm.model import AnyToAny
from tests import parts


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections: they took a seventh of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny products gain nothing from threads, and busy machines make them slow."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def system_tree(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return parts.system_tree(tmp_path_factory.mktemp("system"))


@pytest.fixture
def make_model(system_tree: dict) -> Callable[..., AnyToAny]:
    """`make_model(seed=1)`: the tiny system, freshly built."""

    def make(seed: int = 0, **changes: object) -> AnyToAny:
        return model.build(config.parse_system({**system_tree, **changes}), seed=seed).eval()

    return make


@pytest.fixture
def tiny_model(make_model: Callable[..., AnyToAny]) -> AnyToAny:
    return make_model()


@pytest.fixture
def auto_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that a test makes take the fast paths, whatever the environment says."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "auto")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def second() -> Iterator[torch.device]:
    """The second device (tests/second_device.py)."""
    with second_device.inference_as_no_grad():
        yield second_device.DEVICE


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
    own = re.compile(r"(https?://127\.0\.0\.1:|file:|data:|blob:)")
    assert [trouble for trouble in troubles if not own.match(trouble)] == []
