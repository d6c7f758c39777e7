"""The pages for contributors: answers that exist, and a site without warnings."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def answers() -> list[tuple[str, list[Path], list[str]]]:
    """Question, files and names of each row of the eight questions."""
    table = ARCHITECTURE[ARCHITECTURE.index("## Eight questions") :]
    rows = re.findall(r"^\| (.*\?) \| (.*) \| (.*) \|$", table, re.MULTILINE)
    return [
        (
            question,
            [(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", files)],
            re.findall(r"`([^`]+)`", names),
        )
        for question, files, names in rows
    ]


def defined(path: Path) -> set[str]:
    """What a file or folder defines: names of functions and classes, or of files."""
    if path.is_dir():
        return {entry.name for entry in path.iterdir()}
    if path.suffix != ".py":
        return set()
    kinds = (ast.FunctionDef, ast.ClassDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_there_are_eight_questions() -> None:
    assert len(answers()) == 8


@pytest.mark.parametrize(
    ("question", "files", "names"), answers(), ids=lambda value: str(value)[:40]
)
def test_the_answer_is_where_the_page_says(
    question: str, files: list[Path], names: list[str]
) -> None:
    assert files
    assert [str(file) for file in files if not file.exists()] == []
    found = set().union(*(defined(file) for file in files))
    assert [name for name in names if name not in found] == [], question


def test_every_package_and_module_is_on_the_architecture_page() -> None:
    expected = {
        f"mmllm/{path.name}" if path.suffix == ".py" else f"mmllm/{path.name}/"
        for path in (ROOT / "mmllm").iterdir()
        if path.name not in ("__init__.py", "__main__.py", "version.py")
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    named = set(re.findall(r"`(mmllm/\w+(?:/|\.py))`", ARCHITECTURE))
    assert named & expected == expected, expected - named


@pytest.mark.parametrize("row", re.findall(r"^\| (?!term|-)(.*) \|$", GLOSSARY, re.MULTILINE))
def test_a_term_of_the_glossary_has_a_meaning_and_a_place(row: str) -> None:
    term, meaning, where = row.split(" | ")
    assert len(meaning.split()) > 3, f"{term}: {meaning}"
    places = re.findall(r"`(mmllm/[\w/]+(?:/|\.py))`", where)
    assert places, f"{term}: no place"
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_the_notebook_is_demos_hello_executed() -> None:
    notebook = json.loads((ROOT / "docs" / "hello.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = (ROOT / "demos" / "hello.py").read_text(encoding="utf-8")
    parts = [part.strip() for part in re.split(r"^# %%.*$", script, flags=re.MULTILINE)]
    code = [part for part in parts if part and not part.startswith("# ")]
    assert ["".join(cell["source"]) for cell in cells] == code
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    shown = json.dumps(notebook)
    assert "data:image/" in shown
    assert "data:audio/" in shown


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "mmllm.losses.html").read_text(encoding="utf-8")
    assert "LossTerm" in page
    for name in ("index", "tutorial", "hello", "architecture", "glossary", "CONTRIBUTING"):
        assert (tmp_path / "site" / f"{name}.html").is_file()
