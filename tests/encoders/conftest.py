"""Tiny random twins of encoders on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.encoders.twins import TWINS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a twin, written once."""
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            TWINS[name].write(written[name])
        return written[name]

    return folder
