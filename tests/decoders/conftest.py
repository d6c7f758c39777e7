"""Tiny pipelines on disk, once a session; a fresh decoder for each test that asks for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import Kandinsky5T2IPipeline

from mmllm import config
from mmllm.decoders import kandinsky5
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
def make(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModalityDecoder]:
    """`make("image", guidance=1.0)`: a decoder, nothing loaded yet."""

    def build(family: str, **changes: Any) -> ModalityDecoder:
        if family == "kandinsky5":  # its pipeline makes pictures of a million pixels only
            sizes = [(32, 32)]
            fixed = property(lambda _: sizes, lambda _, value: None)
            monkeypatch.setattr(Kandinsky5T2IPipeline, "resolutions", fixed, raising=False)
            monkeypatch.setattr(kandinsky5, "IMAGE_SIZES", sizes)
        return config.build(tiny.entry(family, folders[family], **changes))

    return build
