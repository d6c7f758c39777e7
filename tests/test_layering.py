"""Who may import whom, what stays free of torch, and that what is imported is declared."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmllm"

ALLOWED: dict[str, set[str]] = {
    # Plain data and words, at the bottom.
    "errors": set(),
    "version": set(),
    "tokens": set(),
    "kernels": {"tokens"},  # what embeddings stand for
    "console": set(),
    "utils": set(),
    "config": {"weights"},
    "licences": {"config"},
    "conversation": {"media"},
    "media": set(),
    "weights": {"mini"},  # the one door to the shipped weights
    "mini": {"conversation"},  # its world composes conversations
    "gallery": {"conversation"},
    # The parts, which do not know one another.
    "projections": {"kernels", "weights"},
    "llm": {"kernels", "tokens", "weights"},
    # `frames` wraps the encoder that its config names, so it builds one.
    "encoders": {"config", "conversation", "media", "mini", "weights"},
    "decoders": {"config", "conversation", "kernels", "media", "weights"},
    # `checking` decodes media and shows samples.
    "data": {"conversation", "gallery", "kernels", "media", "tokens", "weights"},
    # What joins them.
    "model": {
        "config",
        "data",
        "decoders",
        "encoders",
        "kernels",
        "llm",
        "projections",
        "weights",
    },
    # Runs the frozen parts of a model once per item.
    "features": {"conversation", "data", "kernels", "media", "model", "weights"},
    "losses": {"config", "data", "decoders", "kernels", "model", "projections"},
    "checkpoints": {"config", "licences", "llm", "mini", "model", "projections", "weights"},
    "convert": {"checkpoints", "config", "weights"},
    # Programs over any chat model, which is a protocol: it needs no model of ours.
    "reasoning": {"conversation"},
    # Looks inside a model, whatever calls it.
    "insight": {
        "conversation",
        "data",
        "encoders",
        "features",
        "gallery",
        "kernels",
        "mini",
        "model",
        "tokens",
        "weights",
    },
    "inference": {
        "checkpoints",
        "config",
        "conversation",
        "data",
        "decoders",
        "features",
        "kernels",
        "licences",
        "media",
        "model",
        "reasoning",
        "tokens",
        "weights",  # those of encoders are read on first use
    },
    "training": {
        "checkpoints",
        "config",
        "conversation",
        "data",
        "features",
        "gallery",
        "inference",  # the fixed prompts of the samples are answered as users' are
        "kernels",
        "licences",
        "losses",
        "model",
        "projections",
    },
    # Builds what training builds, without weights.
    "planning": {
        "config",
        "data",
        "decoders",
        "kernels",
        "licences",
        "llm",
        "model",
        "training",
    },
    # What people hold in their hands may use everything below it.
    "evaluation": {
        "console",
        "conversation",
        "data",
        "encoders",
        "features",
        "gallery",
        "inference",
        "insight",
        "mini",
        "model",
        "reasoning",
    },
    "demo": {
        "conversation",
        "gallery",
        "inference",
        "media",
        "mini",
        "server",  # what is let in, and by which names, is the same
    },
    "server": {
        "__init__",
        "conversation",
        "decoders",  # for the word Cancelled
        "inference",
        "media",
    },
    "terminal": {"conversation"},
    "cli": {
        "__init__",
        "checkpoints",
        "config",
        "console",
        "conversation",
        "convert",
        "data",
        "decoders",  # which of them a pipeline's folder needs
        "demo",
        "evaluation",
        "features",
        "gallery",
        "inference",
        "insight",
        "kernels",
        "media",
        "mini",
        "planning",
        "reasoning",
        "server",
        "terminal",
        "training",
    },
    "__main__": {"cli"},
    "__init__": {"conversation", "inference"},
}
"""Package -> packages it imports, besides FOUNDATION; lazy imports and those for types count.
A new package is a new line; a new entry in a line needs a reason."""

FOUNDATION = {"errors", "utils", "version"}
"""What every package may import."""

HEAVY = {"accelerate", "diffusers", "peft", "timm", "torch", "torchaudio", "transformers"}

LIGHT = (
    "__init__",
    "cli",
    "cli.terminal_chat",
    "config",
    "console",
    "conversation",
    "demo",
    "errors",
    "gallery",
    "inference",
    "inference.events",
    "inference.inputs",
    "inference.options",
    "inference.replies",
    "licences",
    "media",
    "mini",
    "mini.assets",
    "reasoning",
    "terminal",
    "tokens",
    "weights",
)
"""Modules whose import, with all that it pulls in, costs no heavy package."""

DISTRIBUTIONS = {
    "pi_heif": "pi-heif",
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "liger_kernel": "liger-kernel",
    "markdown_it": "markdown-it-py",
    "open_clip": "open-clip-torch",
    "pydantic_core": "pydantic",
    "prometheus_client": "prometheus-client",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Import name -> name of the package, where they differ."""

NEEDED_BY_OTHERS = {
    "gguf": "transformers, to read the language model's file",
    "open-clip-torch": "mmllm.encoders.open_clip, by import_extra",
    "pip": "mmllm.mini.assets runs it",
    "python-multipart": "starlette, to read forms",
    "scikit-learn": "the linear probes of mmllm.evaluation, by import_extra",
    "torchvision": "timm; pinned, or another torch's would be installed",
}
"""Declared and not imported: why."""


@dataclass(frozen=True)
class Import:
    """One import statement of a module: `target` is a dotted name; `eager` runs on import."""

    target: str
    eager: bool
    line: int


def modules() -> dict[str, Path]:
    """Dotted name below mmllm ("media.image", "media", "__init__") -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts if parts[-1] != "__init__" or len(parts) == 1 else parts[:-1])
        found[name] = path
    return found


MODULES = modules()


def imports(path: Path) -> list[Import]:
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), eager=True))


def _walk(node: ast.AST, *, eager: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, eager, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are absolute"
            assert child.module
            for alias in child.names:
                yield Import(_target(child.module, alias.name), eager, child.lineno)
        else:
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            later = for_types or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _walk(child, eager=eager and not later)


def _target(module: str, name: str) -> str:
    """`from mmllm import media` means mmllm.media; `from mmllm import Chat` means mmllm."""
    inside = f"{module}.{name}".removeprefix("mmllm.")
    return f"mmllm.{inside}" if module.startswith("mmllm") and inside in MODULES else module


def package_of(target: str) -> str:
    """ "mmllm.media.image" -> "media"; "mmllm" -> "__init__"."""
    return target.split(".")[1] if "." in target else "__init__"


def packages_used() -> dict[str, dict[str, str]]:
    """Package -> package that it imports, lazily or for types too -> where, for instance."""
    used: dict[str, dict[str, str]] = {name.split(".")[0]: {} for name in MODULES}
    for name, path in MODULES.items():
        own = used[name.split(".")[0]]
        for entry in imports(path):
            if entry.target.split(".")[0] == "mmllm":
                own.setdefault(package_of(entry.target), f"{path.relative_to(ROOT)}:{entry.line}")
    for package, others in used.items():
        others.pop(package, None)
    return used


USED = packages_used()


def test_every_package_is_in_the_table() -> None:
    assert USED.keys() == ALLOWED.keys()


@pytest.mark.parametrize("package", USED)
def test_the_table_allows_exactly_what_packages_import(package: str) -> None:
    used = {name: where for name, where in USED[package].items() if name not in FOUNDATION}
    allowed = ALLOWED.get(package, set())
    odd = [f"{where} imports {name}" for name, where in used.items() if name not in allowed]
    assert odd == [], f"{package} may import {sorted(allowed)}"
    assert allowed - used.keys() == set(), (
        f"{package} does not import these: take them off its line"
    )


def test_packages_do_not_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for types count: packages that need each other are one."""
    done: set[str] = set()

    def visit(package: str, path: tuple[str, ...]) -> None:
        circle = [*path, package]
        steps = [f"{USED[a][b]} imports {b}" for a, b in itertools.pairwise(circle)]
        assert package not in path, "\n".join(steps[path.index(package) :])
        if package not in done:
            for other in USED[package]:
                visit(other, (*path, package))
            done.add(package)

    for package in USED:
        visit(package, ())


def test_no_module_imports_itself_in_a_circle() -> None:
    eager = {
        name: {
            entry.target.removeprefix("mmllm.")
            for entry in imports(path)
            if entry.eager and entry.target.startswith("mmllm.")
        }
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in done:
            for follower in eager.get(name, ()):
                visit(follower, (*path, name))
            done.add(name)

    for name in eager:
        visit(name, ())


def test_no_test_module_is_imported_by_another() -> None:
    """What several of them use is in a module of helpers."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 100
    shared = [
        f"{path.relative_to(ROOT)}:{entry.line} imports {entry.target}"
        for path in files
        for entry in imports(path)
        if re.match(r"tests\.(.*\.)?test_", entry.target)
    ]
    assert shared == []


def test_a_public_class_has_a_name_of_its_own() -> None:
    homes: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name)
    assert len(homes) > 100
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_no_file_is_longer_than_400_lines() -> None:
    schemas = "server.schemas"  # a list
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in MODULES.items()}
    assert {name: num for name, num in lines.items() if num > 400 and name != schemas} == {}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_pull_in_nothing_heavy(name: str) -> None:
    reached, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current in reached or current not in MODULES:
            continue
        reached.add(current)
        for entry in imports(MODULES[current]):
            if not entry.eager:
                continue
            top, _, rest = entry.target.partition(".")
            assert top not in HEAVY, f"mmllm.{name} imports {top}, by way of {current}"
            if top == "mmllm":
                waiting.append(rest or "__init__")


def test_importing_mmllm_loads_nothing_heavy() -> None:
    """The same in a real process, for what the walk above cannot see."""
    program = (
        "import sys, mmllm, mmllm.cli, mmllm.config, mmllm.media;"
        f"print(sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_imported_packages_are_declared_and_declared_ones_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = list(project["dependencies"])
    for name in ("demo", "encoders", "evaluation", "server", "quantization", "liger", "ray"):
        lines += extras[name]
    declared = {re.split(r"[^\w-]", line)[0] for line in lines}
    imported = {
        DISTRIBUTIONS.get(top, top)
        for path in MODULES.values()
        for entry in imports(path)
        if (top := entry.target.split(".")[0]) not in {"mmllm", *sys.stdlib_module_names}
    }
    assert imported - declared == set()
    assert declared - imported - NEEDED_BY_OTHERS.keys() == set()
