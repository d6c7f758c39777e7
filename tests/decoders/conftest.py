"""Tiny pipelines on disk, once a session; a fresh decoder for each test that asks for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmllm import config
from mmllm.decoders.decoder import ModalityDecoder
from tests.decoders import tiny


class Folders(dict[str, Path]):
    """Family -> the folder of its pipeline, made when first asked for."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, family: str) -> Path:
        self[family] = tiny.save(family, self.root / family)
        return self[family]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture
def make(folders: Folders) -> Callable[..., ModalityDecoder]:
    """`make("image", guidance=1.0)`: a decoder, nothing loaded yet."""

    def build(family: str, **changes: Any) -> ModalityDecoder:
        return config.build(tiny.entry(family, folders[family], **changes))

    return build
