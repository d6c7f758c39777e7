"""docs/server.md: its examples are run as they stand, against the tiny model."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.conftest import Served
from tests.server.files import PNG

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the file that the examples read."""
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "cat.png").write_bytes(PNG)
    return tmp_path


def for_here(example: str, served: Served) -> str:
    return example.replace("http://127.0.0.1:8000", served.url).replace('"mini"', '"tiny"')


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_examples_of_the_client(here: Path, served: Served) -> None:
    """All in one namespace, as somebody would type them one after the other."""
    names: dict[str, object] = {}
    blocks = examples("python")
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(for_here(block, served), "docs/server.md", "exec"), names)
    for name in ("apple.png", "rain.wav", "rocket.mp4"):
        assert (here / name).stat().st_size > 100


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", examples("sh"), ids=lambda block: block.split("\n")[0][-30:])
def test_the_examples_of_curl(here: Path, served: Served, block: str) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", for_here(block, served)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert '"error":{' not in done.stdout
