"""report.html and curves.png of a run whose numbers and samples are known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from mmllm.conversation import assistant, user
from mmllm.gallery import GalleryEntry, write_gallery
from mmllm.training.curves import COLUMNS, loss_names, plot_curves, title_of
from mmllm.training.report import write_report
from tests.samples import picture, sound

ROWS: list[dict[str, Any]] = [
    {"step": step, "seconds": 2.0, "text": 4.0 - step, "align/audio": 2.0, "align/image": 1.0}
    | {"kl": 0.5, "denoise/image": 0.3, "loss": 9.0 - step, "validation/text": 5.0 - step}
    for step in range(3)
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run: samples of five steps, the first of which had another prompt."""
    output = tmp_path / "a <run>"
    for step in range(5):
        prompt = user("draw" if step else "paint", picture(16))
        reply = assistant(f"at {step} <b>", picture(64), sound())
        write_gallery(output / f"samples/step-{step:08d}", "x", [GalleryEntry((prompt, reply))])
    (output / "config.yaml").write_text("stage: {}\n")
    return output


def test_losses_have_names_for_readers_and_stand_by_modality() -> None:
    assert [title_of(name) for name in loss_names(ROWS)] == [
        "weighted sum of all losses",
        "text: cross-entropy",
        "text: divergence from the base model",
        "audio: alignment",
        "image: alignment",
        "image: denoising",
    ]


def test_the_report_shows_losses_samples_and_speed_first(run: Path) -> None:
    page = write_report(run, ROWS, batch_size=8).read_text()
    heads = re.findall(r"<h2>(.*?)</h2>|<summary>(.*?)</summary>", page)
    assert ["".join(head) for head in heads] == [
        "Losses",
        "Samples over the steps",
        "Speed and memory",
        "Versions",
        "Config",
    ]
    assert page.count("data:image/svg+xml") == 6
    assert '<th scope="row">text: cross-entropy</th><td>4.000</td><td>2.000</td><td>3.000' in page
    assert "conversations a second</th><td>4.0<" in page
    assert not re.search(r'src="(?!data:)', page)  # it can be sent
    assert "<run>" not in page
    assert "align/audio" not in page
    assert "prefers-color-scheme:dark" in page


def test_samples_of_the_same_prompts_stand_side_by_side(run: Path) -> None:
    page = write_report(run, ROWS, batch_size=8).read_text()
    assert re.findall(r'<th scope="col">(.*?)</th>', page) == [
        *("Prompt", "step 1", "step 2", "step 3", "step 4")
    ]
    assert [f"at {step} &lt;b&gt;" in page for step in range(5)] == [False, True, True, True, True]
    assert page.count("<audio controls") == 4
    assert page.count('class="zoom" aria-label="Enlarge"') == 1 + 4
    assert page.count("4 x 4 pixels") == 1 + 4


def test_a_run_without_steps_and_samples_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("stage: {}\n")
    page = write_report(tmp_path, [], batch_size=8).read_text()
    assert "<h2>Losses" not in page
    assert "<h2>Samples" not in page


def test_curves_are_a_grid(tmp_path: Path) -> None:
    plot_curves(tmp_path / "curves.png", ROWS)
    width, height = PILImage.open(tmp_path / "curves.png").size
    assert (width, height) == (400 * COLUMNS, 600)
