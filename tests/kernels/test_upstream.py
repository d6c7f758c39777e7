"""What mmllm uses of other packages without their promise still exists, and is listed."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

import mmllm

PACKAGE = Path(mmllm.__file__).parent
README = PACKAGE / "kernels" / "README.md"
ROWS = [
    tuple(cell.strip() for cell in line.strip("|\n ").split("|"))
    for line in README.read_text(encoding="utf-8").split("## Interfaces")[1].splitlines()
    if line.startswith("| `")
]
LISTED = {row[0].strip("`"): row[1] for row in ROWS if row[0].count("`") == 2 and "(" not in row[0]}
INSTANCES: dict[str, Any] = {
    "torch.Tensor": torch.zeros(1),
    "torch.UntypedStorage": torch.zeros(1).untyped_storage(),
    "torch.nn.Module": nn.Linear(1, 1),
    "peft.tuners.lora.layer.LoraLayer": Linear(nn.Linear(1, 1), "default", LoraConfig(r=1), r=1),
}
"""Objects of classes whose attributes are set when they are made."""


def resolve(path: str) -> Any:
    """The object of a dotted path; AttributeError if there is none."""
    parent, _, name = path.rpartition(".")
    if parent in INSTANCES:
        return getattr(INSTANCES[parent], name)
    try:
        return importlib.import_module(path)
    except ImportError:
        if not parent:
            raise AttributeError(path) from None
    return getattr(resolve(parent), name)


@pytest.mark.parametrize("path", LISTED)
def test_an_interface_that_is_not_public_still_exists(path: str) -> None:
    row = next(row for row in ROWS if row[0] == f"`{path}`")
    try:
        resolve(path)
    except AttributeError:
        package = importlib.import_module(path.split(".")[0])
        pytest.fail(
            f"{path} is gone in {package.__name__} {getattr(package, '__version__', '')}, and "
            f"mmllm/{row[1]} uses it. Fallback: {row[2]} (mmllm/kernels/README.md)"
        )


@pytest.mark.parametrize("path", LISTED)
def test_what_is_listed_is_used_there(path: str) -> None:
    place = PACKAGE / LISTED[path]
    files = list(place.rglob("*.py")) if place.is_dir() else [place, place.with_suffix(".py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    name = "_hf_hook" if path.endswith("add_hook_to_module") else path.rpartition(".")[2]
    assert re.search(rf"\b{name}\b", text), f"nothing in mmllm/{LISTED[path]} uses {path}"


def test_what_the_kernels_use_is_listed() -> None:
    names = {path.rpartition(".")[2] for path in LISTED}
    for file in sorted((PACKAGE / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or not re.match(r"_[a-z]", node.attr):
                continue
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                assert node.attr in names, f"{file.name}:{node.lineno} uses {node.attr}"


def test_every_kernel_is_described() -> None:
    described = README.read_text(encoding="utf-8")
    for file in sorted((PACKAGE / "kernels").glob("*.py")):
        if file.name not in ("__init__.py", "backend.py", "reference.py"):
            assert f"`{file.name}`" in described, f"README.md does not say what {file.name} is"
