"""Garbage collection while a model is loaded."""

from __future__ import annotations

import gc

import pytest

import mmllm
from mmllm.errors import ConfigError
from mmllm.utils.garbage import no_collection


def test_collection_is_as_it_was_before() -> None:
    assert gc.isenabled()
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_model_that_cannot_be_loaded_leaves_it_on() -> None:
    with pytest.raises(ConfigError):
        mmllm.load("mini", dtype="float8")
    assert gc.isenabled()
