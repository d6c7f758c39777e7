"""One tiny system on disk for the whole session; a fresh model of it for each test that asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import second_device  # isort: skip - it has to come before mmllm
from mmllm import config, model
from mmllm.kernels.backend import ENVIRONMENT_VARIABLE
from mmllm.model import AnyToAny
from tests import parts


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
