"""Tests of kernels choose them whatever the environment says; the tiny families of models."""

from __future__ import annotations

import pytest

from mmllm.kernels.backend import ENVIRONMENT_VARIABLE
from tests.llm.conftest import folders

__all__ = ["folders"]


@pytest.fixture(autouse=True)
def auto_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "auto")
