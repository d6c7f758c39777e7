"""A private name is used by its own module only, in tests as well: the rest is a public seam."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmllm"
FOLDERS = ("mmllm", "tests", "tools", "benchmarks", "demos", "train")
PRIVATE = re.compile(r"_[A-Za-z]\w*(?<!_)")
"""`_name`; dunders, and those of a protocol of others such as `_repr_html_`, end with _."""
PATCHING = {"delattr", "getattr", "hasattr", "setattr"}
"""Functions and methods (of monkeypatch) that take the name of an attribute as a text."""


def private_definitions(tree: ast.AST) -> set[str]:
    """Private functions, classes, variables and attributes that a module defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if PRIVATE.fullmatch(name)}


def uses(tree: ast.AST, own: set[str], ours: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name of mmllm in a module that does not define it.

    Args:
        tree: the module.
        own: the private names that it defines itself.
        ours: those that mmllm defines; another library's private names are not meant.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmllm"):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr in ours - own:
            names = [node.attr]
        elif isinstance(node, ast.Constant) and re.match(r"mmllm\.[\w.]+$", str(node.value)):
            names = str(node.value).split(".")
        elif isinstance(node, ast.Call) and _function_name(node.func) in PATCHING:
            texts = [entry.value for entry in node.args if isinstance(entry, ast.Constant)]
            names = [text for text in texts if isinstance(text, str) and text in ours - own]
        else:
            continue
        yield from ((node.lineno, name) for name in names if PRIVATE.fullmatch(name))


def _function_name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


TREES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
OWN = {path: private_definitions(tree) for path, tree in TREES.items()}
OURS = {name for path, names in OWN.items() if path.is_relative_to(PACKAGE) for name in names}


def test_private_names_stay_in_their_module() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} uses {name}"
        for path, tree in TREES.items()
        for line, name in uses(tree, OWN[path], OURS)
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from mmllm.media.image import _upright",
        "image._upright(picture)",
        "model.dispatcher._queue._line",
        "monkeypatch.setattr(image, '_upright', upright)",
        "monkeypatch.setattr('mmllm.media.image._upright', upright)",
    ],
)
def test_a_private_name_is_found_however_it_is_reached(source: str) -> None:
    assert list(uses(ast.parse(source), set(), {"_upright", "_line"}))


@pytest.mark.parametrize(
    "source",
    [
        "from mmllm.media.rgb import to_rgb",
        "model.__class__",
        "torch._dynamo.reset()",
        "reply._repr_html_()",
        "mock.patch('_upright is a word of this text')",
    ],
)
def test_public_names_and_those_of_others_are_ignored(source: str) -> None:
    assert not list(uses(ast.parse(source), set(), {"_upright", "_line", "_repr_html_"}))
