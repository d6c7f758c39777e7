"""Imports that are postponed."""

from __future__ import annotations

import sys

import pytest

from mmllm.utils.imports import deferred_imports


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """The name of a module that can be imported, and is not yet."""
    (tmp_path / "postponed.py").write_text("def double(x):\n    return 2 * x\n\nFACTOR = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "postponed", raising=False)
    return "postponed"


def test_a_function_is_imported_when_it_is_called(module, monkeypatch):
    with deferred_imports(module):
        from postponed import double  # pyright: ignore[reportMissingImports]
    assert module not in sys.modules
    assert double(4) == 8
    assert sys.modules[module].FACTOR == 2
    monkeypatch.delitem(sys.modules, module)


def test_a_module_is_imported_when_an_attribute_is_used(module, monkeypatch):
    with deferred_imports(module):
        import postponed  # pyright: ignore[reportMissingImports]
    assert module not in sys.modules
    assert (postponed.FACTOR, postponed.double(3)) == (2, 6)
    monkeypatch.delitem(sys.modules, module)


def test_what_is_imported_or_not_installed_is_left_alone():
    with deferred_imports("json", "no_such_module_here"):
        import json

        with pytest.raises(ModuleNotFoundError):
            import no_such_module_here  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert json.loads("[1]") == [1]
