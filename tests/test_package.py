"""The published packages: metadata and contents of wheel and sdist, and the Dockerfiles."""

from __future__ import annotations

import email
import email.message
import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from hatchling.build import prepare_metadata_for_build_wheel
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import mmllm
from mmllm.cli import entry

ROOT = Path(__file__).parents[1]
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")


def contents(builder: type[WheelBuilder | SdistBuilder]) -> set[str]:
    """The names of the files that `make dist` packs."""
    files = builder(str(ROOT)).recurse_included_files()
    return {Path(file.distribution_path).as_posix() for file in files}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> email.message.Message:
    folder = tmp_path_factory.mktemp("metadata")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        info = prepare_metadata_for_build_wheel(str(folder))
    return email.message_from_bytes((folder / info / "METADATA").read_bytes())


# --- wheel and sdist ----------------------------------------------------------------------------


def test_the_metadata_is_that_of_the_project(metadata: email.message.Message) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["Name"] == "mmllm"
    assert metadata["Version"] == mmllm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File") or ()) == {"LICENSE", "NOTICE"}
    assert set(metadata.get_all("Provides-Extra") or ()) == set(project["optional-dependencies"])
    urls = [url for name in ("Project-URL", "Home-page") for url in metadata.get_all(name) or ()]
    assert not [url for url in urls if "example" in url or "TODO" in url]


def test_the_long_description_leads_nowhere_that_an_index_has_not(
    metadata: email.message.Message,
) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    payload = metadata.get_payload(decode=True)
    assert isinstance(payload, bytes)
    text = payload.decode("utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert "<!--" not in text
    headings = re.findall(r"^## .*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"^## .*", text, re.MULTILINE) == headings


def test_the_wheel_holds_what_is_imported_and_named() -> None:
    names = contents(WheelBuilder)
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mmllm").rglob("*.py")}
    configs = {f"mmllm/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert code | configs <= names
    assert {"mmllm/py.typed", "mmllm/mini/checkpoint/manifest.json"} <= names
    assert {name.partition("/")[0] for name in names} == {"mmllm"}


def test_the_sdist_builds_the_wheel() -> None:
    names = contents(SdistBuilder)
    assert {"mmllm/" + name for name in names if name.startswith("configs/")} <= contents(
        WheelBuilder
    )
    needed = {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "tools/package_readme.py"}
    needed |= {"mmllm/version.py", "configs/mini/system.yaml", "train/train.py", "Makefile"}
    assert needed <= names
    assert not [name for name in names if name.startswith((".venv", "runs/", "build/", "dist/"))]


# --- Dockerfiles --------------------------------------------------------------------------------


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its text) of a Dockerfile, with continued lines joined."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.partition(" ") for line in joined.split("\n") if line.strip()]
    return [(word, rest) for word, _, rest in found]


def command(name: str, word: str) -> list[str]:
    (text,) = [rest for instruction, rest in instructions(name) if instruction == word]
    return json.loads(text)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_copies_what_there_is(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copies = [shlex.split(rest)[:-1] for word, rest in instructions(name) if word == "COPY"]
    sources = [source for copy in copies if not copy[0].startswith("--from") for source in copy]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), f"{source}: not in .dockerignore"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_runs_our_command_as_a_user(name: str) -> None:
    assert command(name, "ENTRYPOINT") == ["mmllm"]
    subcommand, *arguments = command(name, "CMD")
    group: Any = typer.main.get_command(entry.app)
    context = click.Context(group)
    serve = group.get_command(context, subcommand)
    given = serve.make_context(subcommand, arguments, parent=context).params
    assert (given["host"], given["port"]) == ("0.0.0.0", 8000)
    words = dict(instructions(name))
    assert words["EXPOSE"] == "8000"
    assert words["USER"].isdigit()
    assert words["USER"] != "0"
    assert ":8000/health" in words["HEALTHCHECK"]
    assert "http" not in re.sub(r"http://127\.0\.0\.1", "", str(instructions(name)))
    images = [rest for word, rest in instructions(name) if word == "FROM"]
    assert all(":" in image for image in images), "a tag"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_installs_the_locked_versions(name: str) -> None:
    """The `sed` of the Dockerfile finds each version of requirements.lock, without its hashes."""
    (run,) = [rest for word, rest in instructions(name) if word == "RUN" and "sed" in rest]
    assert "--constraint versions.txt" in run
    # A shell remembers where it found `python`: the environment is made by a command before.
    (made,) = [rest for word, rest in instructions(name) if word == "RUN" and "-m venv" in rest]
    assert made == "python -m venv /opt/venv"
    pattern, replacement = re.findall(r"'s/(.*?)/(\\1\\3)/p'", run)[0]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").split("\n")
    versions = [re.sub(pattern, replacement, line) for line in lock if re.match(pattern, line)]
    assert len(versions) == len([line for line in lock if re.match(r"[a-z0-9]", line)])
    assert f"torch=={torch_version(lock)} " in versions
    assert not [line for line in versions if "[" in line or "\\" in line or "--hash" in line]


def torch_version(lock: list[str]) -> str:
    return next(line.split("==")[1].split(" ")[0] for line in lock if line.startswith("torch=="))
