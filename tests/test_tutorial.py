"""docs/tutorial.md works as it is printed: files are written and commands are run, in order.

Only numbers of steps are made smaller.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
SHORTER = {
    "--steps 400": "--steps 2",
    "steps: 300, batch_size: 64": "steps: 3, batch_size: 8",
    "conversations: 600": "conversations: 8",
    "steps: 12\n": "steps: 2\n",
    "steps: 24\n": "steps: 2\n",
    "--out runs/taught": "--out runs/taught --steps 100",
}
EXPECTED = {
    "my/images/ask/llama": "llama",
    "my/apple.png": "apple",
    "Draw a llama.": "my/llama.png",
}
"""Part of a command -> what it prints."""


def blocks(chapter: str) -> list[tuple[str, str]]:
    """Language and text of each code block, with the name of the file that the words before a YAML
    say it is saved as."""
    text = PAGE[PAGE.index(f"\n## {chapter}") :]
    text = text[: text.find("\n## ", 1)] if "\n## " in text[1:] else text
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        name = re.findall(r"as `([^`]+\.yaml)`", text[: match.start()])
        found.append((name[-1] if match[1] == "yaml" else match[1], match[2]))
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "my").mkdir()
    for name in ("demos", "configs", "mmllm"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(line: str, home: Path) -> str:
    words = shlex.split(line)
    program = {"mmllm": ["-m", "mmllm"], "python": []}[words[0]]
    done = processes.run([*program, *words[1:]], cwd=home, timeout=500)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("chapter", re.findall(r"^## (.*)$", PAGE, re.MULTILINE))
def test_a_chapter_works_as_it_is_printed(chapter: str, home: Path) -> None:
    if chapter.startswith("4") and not (home / "my/images").exists():
        run("python demos/unseen.py my/images", home)  # where chapter 2 ran in another process
    assert blocks(chapter)
    for kind, block in blocks(chapter):
        for full, short in SHORTER.items():
            block = block.replace(full, short)
        if kind == "bash":
            for line in block.splitlines():
                printed = run(line, home)
                for part, expected in EXPECTED.items():
                    assert part not in line or expected in printed, f"{line}\n{printed}"
        elif kind == "python":
            (home / "block.py").write_text(block, encoding="utf-8")
            run("python block.py", home)
        else:
            (home / kind).write_text(block, encoding="utf-8")


def test_the_page_is_about_what_the_test_makes_shorter() -> None:
    assert [text for text in SHORTER if text not in PAGE] == []
