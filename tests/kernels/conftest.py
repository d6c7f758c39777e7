"""Tests of kernels choose them whatever the environment says; the tiny families of models."""

from __future__ import annotations

import pytest

from tests.llm.conftest import folders

__all__ = ["folders"]


@pytest.fixture(autouse=True)
def kernels_in_use(auto_kernels: None) -> None: ...
