"""Public functions and configs are described, and the examples in docstrings give what they show.

The sections are Google's. That a section `Args` names every parameter, and no other, is checked by
ruff (pyproject.toml); here, that the section is there and that examples are run.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "mmllm").rglob("*.py"))}
TREES = {path: ast.parse(text) for path, text in FILES.items()}
CLASSES = {
    node.name: node
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.ClassDef)
}
"""The classes of mmllm by name, which is unique."""
OTHERS = {"cli", "demo", "mini", "server"}
"""Packages that are no Python interface: of commands, routes and pages the options are documented
where their users see them."""
BUILDER = "build"
"""A function of every component file, whose parameters mmllm/config/registry.py describes."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.AST) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    """(class or None, function) of each public function and of public methods of public classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for _, function in public_functions(node):
                yield node, function
        elif isinstance(node, Function) and not node.name.startswith("_"):
            yield from [] if is_overload(node) else [(None, node)]


def is_overload(function: Function) -> bool:
    """Whether it is one of several signatures; the function that follows them is described."""
    return any(ast.unparse(decorator) == "overload" for decorator in function.decorator_list)


def parameters(function: Function) -> list[str]:
    """The names of a function's parameters but `self` and `cls`."""
    given = function.args
    named = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [entry.arg for entry in named if entry and entry.arg not in ("self", "cls")]


def bases(cls: ast.ClassDef) -> set[str]:
    """The names of all base classes, those of a base in mmllm included."""
    names: set[str] = set()
    for base in cls.bases:
        name = ast.unparse(base).split("[")[0].rpartition(".")[2]
        names.add(name)
        if name in CLASSES and name != cls.name:  # one of a library may have the same name
            names |= bases(CLASSES[name])
    return names


def methods(cls: ast.ClassDef) -> set[str]:
    """The names of a class's methods, those of its bases included."""
    own = {node.name for node in cls.body if isinstance(node, Function)}
    return own.union(*(methods(CLASSES[name]) for name in known_bases(cls)))


def fields(cls: ast.ClassDef) -> set[str]:
    """The names of a class's attributes, which may stand for a protocol's properties."""
    named = (node for line in cls.body for node in ast.walk(line) if isinstance(node, ast.Name))
    stored = (node for node in ast.walk(cls) if isinstance(node, ast.Attribute))
    names = [(node.id, node.ctx) for node in named] + [(node.attr, node.ctx) for node in stored]
    return {name for name, context in names if isinstance(context, ast.Store)}


def known_bases(cls: ast.ClassDef) -> set[str]:
    return (bases(cls) & CLASSES.keys()) - {cls.name}


def is_described_elsewhere(cls: ast.ClassDef | None, function: Function) -> bool:
    """Whether the parameters belong to a contract: a base class, a protocol, autograd, `build`."""
    if cls is None:
        return function.name == BUILDER
    if "Protocol" in bases(cls):
        return False
    contracts = [CLASSES[name] for name in known_bases(cls)]
    contracts += [
        other
        for other in CLASSES.values()
        if "Protocol" in bases(other) and methods(other) <= methods(cls) | fields(cls)
    ]
    names = {node.name for base in contracts for node in base.body if isinstance(node, Function)}
    is_autograd = "Function" in bases(cls) and function.name in ("forward", "backward")
    return function.name in names or is_autograd


INTERFACE = [
    (f"{path.relative_to(ROOT)}:{function.lineno} {function.name}", function)
    for path, tree in TREES.items()
    if path.relative_to(ROOT / "mmllm").parts[0] not in OTHERS
    for cls, function in public_functions(tree)
    if not is_described_elsewhere(cls, function)
]
"""(place, function) of what the Python interface consists of."""


def test_public_functions_have_a_docstring() -> None:
    assert [place for place, function in INTERFACE if not ast.get_docstring(function)] == []


def test_public_functions_describe_their_parameters() -> None:
    missing = [
        place
        for place, function in INTERFACE
        if len(parameters(function)) > 1
        and not re.search(r"^Args:\n    \S", ast.get_docstring(function) or "", re.MULTILINE)
    ]
    assert missing == [], "these have two parameters or more and no section `Args`"


def own_fields(cls: ast.ClassDef) -> dict[str, bool]:
    """The fields that no base class has -> whether a text follows the field.

    A field with one possible value, which says what its class is for, is left out.
    """
    inherited = {name for base in bases(cls) & CLASSES.keys() for name in own_fields(CLASSES[base])}
    return {
        node.target.id: isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        for node, after in zip(cls.body, [*cls.body[1:], None], strict=True)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if not node.target.id.startswith("_") and "ClassVar" not in ast.unparse(node.annotation)
        if node.target.id not in inherited
        if not re.fullmatch(r"Literal\['\w+'\]", ast.unparse(node.annotation))
    }


@pytest.mark.parametrize("name", [name for name in CLASSES if re.search(r"[a-z]Config$", name)])
def test_every_key_of_a_config_is_described(name: str) -> None:
    """By the class's section `Attributes`, or a text below the field."""
    docstring = ast.get_docstring(CLASSES[name]) or ""
    section = docstring.partition("Attributes:\n")[2]
    missing = [
        field
        for field, has_text in own_fields(CLASSES[name]).items()
        if not has_text and not re.search(rf"^    {field}: \S", section, re.MULTILINE)
    ]
    assert missing == []


WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path, text in FILES.items()
    if ">>> " in text
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_what_they_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0, "see the output"
    assert results.attempted > 0
