"""What the README, the docs, the demos, the Makefile and the configs' headers tell exists."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import mmllm
from mmllm.cli import app
from mmllm.config import COMPONENTS, StageConfig, parse_component
from mmllm.conversation import Medium
from mmllm.inference.chat import Chat
from mmllm.inference.options import INPUT_OPTIONS
from mmllm.inference.replies import Reply
from mmllm.inference.sampling import Sampling

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHAPES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
STAGES = sorted((ROOT / "configs").glob("*/[0-9]_*.yaml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]


def blocks(language: str) -> Iterator[str]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield from re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def code_words() -> set[str]:
    """What stands between single backticks."""
    prose = "".join(
        re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for page in PAGES
    )
    return set(re.findall(r"`([^`\n]+)`", prose))


def shell_lines() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += [word for word in code_words() if re.match(r"(make|mmllm|accelerate launch) \w", word)]
    for shape in SHAPES:
        header = shape.read_text(encoding="utf-8").splitlines()
        lines += [line.lstrip("# ") for line in header if re.match(r"#   \S.*launch", line)]
    recipes = re.sub(r"\\\n", " ", MAKEFILE)
    lines += [
        re.sub(r"\$\(\w+\)|\$[@<]", "X", line.strip()).removeprefix("X/")
        for line in recipes.splitlines()
        if line.startswith("\t$(BIN)/mmllm")
    ]
    return sorted({" ".join(line.split()) for line in lines if line.strip()})


@pytest.mark.parametrize("line", shell_lines())
def test_a_command_exists(line: str) -> None:
    words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
    while "=" in words[0]:
        words.pop(0)
    program = words.pop(0).removeprefix(".venv/bin/")
    if program == "make":
        assert re.search(rf"^{words[0]}:", MAKEFILE, re.MULTILINE), f"no target {words[0]}"
    elif program == "mmllm":
        command = COMMANDS[words.pop(0)]
        arguments = [word for word in words if word != "…"]
        if arguments or "`" not in line:
            takes_one = any(param.param_type_name == "argument" for param in command.params)
            command.make_context(command.name, arguments or ["X"] * takes_one)
    elif program == "python":
        module = words[1].replace(".", "/") if words[0] == "-m" else ""
        places = [f"{module}.py", f"{module}/__main__.py"] if module else words[:1]
        assert any((ROOT / place).is_file() for place in places)
    elif program == "sbatch":
        assert any((ROOT / word).is_file() for word in words)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words)
        assert (options.module, options.training_script) == (True, "mmllm")
        command, *arguments = options.training_script_args
        assert (ROOT / arguments[0]).is_file()
        COMMANDS[command].make_context(command, arguments)
    elif program == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    else:
        assert program == "accelerate", f"what is {program}?"
        _check_launch(words)


def _check_launch(words: list[str]) -> None:
    if "…" in words or "--config_file" not in words:
        return
    from accelerate.commands.launch import launch_command_parser

    assert words.pop(0) == "launch"
    options = launch_command_parser().parse_args(words)
    assert (ROOT / options.config_file).is_file()
    assert options.training_script == "train/train.py"
    stage, *rest = options.training_script_args
    assert stage == "CONFIG" or (ROOT / stage).is_file(), f"{stage} does not exist"
    COMMANDS["train"].make_context("train", [stage, *rest])


def test_paths_and_links_exist() -> None:
    links = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\((?!\w+:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    }
    named = {
        ROOT / word
        for word in code_words()
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.(md|py|yaml|png))", word)
        and "/" in word
        and not word.startswith(("runs/", "my/"))
    }
    assert [str(path) for path in sorted(links | named) if not path.exists()] == []


def python_sources() -> list[tuple[str, str]]:
    found = [(f"block {number}", block) for number, block in enumerate(blocks("python"))]
    demos = sorted((ROOT / "demos").glob("*.py"))
    return found + [(path.name, path.read_text(encoding="utf-8")) for path in demos]


@pytest.mark.parametrize(("name", "source"), python_sources(), ids=lambda value: value[:12])
def test_python_examples_name_what_exists(name: str, source: str) -> None:
    """Imports, `mmllm.…`, attributes of a chat, a reply and a medium, and keywords of `reply`."""
    tree = ast.parse(source)
    kinds = {"chat": Chat, "reply": Reply}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmllm"):
            exec(compile(ast.Module([node], []), name, "exec"), {})
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "mmllm":
                assert hasattr(mmllm, node.attr), f"mmllm.{node.attr}"
            elif node.value.id in kinds and node.attr != "model":
                cls = kinds[node.value.id]
                known = set(dir(cls)) | set(getattr(cls, "__dataclass_fields__", {}))
                assert node.attr in known, f"{cls.__name__}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {entry.arg for entry in node.keywords}
            if node.func.attr in ("reply", "reply_many"):
                known = set(inspect.signature(getattr(Chat, node.func.attr)).parameters)
                known |= INPUT_OPTIONS
                assert keywords <= known | set(inspect.signature(Sampling).parameters)
            elif node.func.attr == "load":
                assert keywords <= set(inspect.signature(mmllm.load).parameters)


def test_what_the_readme_says_of_media_holds() -> None:
    from mmllm.media import audio, image, video

    assert ".png" in image.SUFFIXES
    assert ".wav" in audio.SUFFIXES
    assert {".mp4", ".webp"} <= set(video.SUFFIXES)
    assert callable(Medium.save)
    assert all(callable(getattr(mmllm.Image, name)) for name in ("to_pil", "to_numpy"))


@pytest.mark.parametrize("block", list(blocks("yaml")), ids=lambda block: block[:12])
def test_yaml_examples_use_known_keys(block: str) -> None:
    tree = yaml.safe_load(block)
    groups = ("encoders", "decoders", "output_projections")
    assert tree.keys() <= {"system", "stage", *groups}
    assert tree.get("stage", {}).keys() <= set(inspect.signature(StageConfig).parameters)
    for group in groups:
        for key, entry in tree.get(group, {}).items():
            if ":" not in entry["type"]:  # an own one: its page has a test of its own
                parse_component(group, entry, f"{group}.{key}")
    for key, entry in tree.get("stage", {}).get("data", {}).items():
        parse_component("data", entry, f"data.{key}")


def test_every_kind_of_data_has_an_example() -> None:
    trees = [yaml.safe_load(block).get("stage", {}) for block in blocks("yaml")]
    shown = {entry["type"] for tree in trees for entry in tree.get("data", {}).values()}
    assert shown == set(COMPONENTS["data"])


def test_every_decoder_has_an_example() -> None:
    examples = [yaml.safe_load(block).get("decoders", {}) for block in blocks("yaml")]
    shown = {entry["type"] for example in examples for entry in example.values()}
    own = {"my_decoder:MyConfig"}  # the family that docs/decoders.md writes
    assert shown - own == set(COMPONENTS["decoders"])


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_a_launch_config_is_headed_with_its_command_and_read_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    text = path.read_text(encoding="utf-8")
    assert f"--config_file configs/accelerate/{path.name}" in text.split("compute_environment")[0]
    read = load_config_from_file(str(path))
    assert read.num_processes == yaml.safe_load(text)["num_processes"]
    assert read.mixed_precision in ("no", "bf16")


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_is_headed_with_command_hardware_time_and_score(path: Path) -> None:
    header = "".join(
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.startswith("#")
    )
    assert f"train/train.py configs/{path.parent.name}/{path.name}" in header
    for word in ("hardware", "time", "score"):
        assert word in header.lower(), f"the header names no {word}"


def test_nothing_names_an_index_or_a_machine() -> None:
    """The lock file and the build must work wherever packages come from."""
    for name in ("requirements.lock", "pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|file:|--(extra-)?index-url|/root/|/home/", text), name


def test_the_lock_pins_what_is_declared() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / "requirements.lock").read_text(), re.M)
    locked: dict[str, list[str]] = {}
    for name, version in lines:
        locked.setdefault(name, []).append(version)
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["dev"] + extras["demo"]:
        wanted = Requirement(line)
        assert wanted.name in locked, f"{line}: not locked; run `make lock`"
        assert all(version in wanted.specifier for version in locked[wanted.name]), line
