"""The tiny families, written once for the whole session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.llm.families import write


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("families")

    def folder(name: str, tied: bool = True) -> Path:
        place = root / f"{name}-{tied}"
        return place if place.exists() else write(name, place, tied=tied)

    return folder
