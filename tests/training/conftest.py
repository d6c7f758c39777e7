"""A stage over twelve real files, for every test of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmllm import config
from mmllm.config import RunConfig
from mmllm.conversation import Audio, Image, Video
from mmllm.training import journal, report
from mmllm.utils import files


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve real files and their pairs, in the format that users have."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(4):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        frames = rng.integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
        wave = rng.uniform(-0.5, 0.5, (1, 2048)).astype(np.float32)
        media = {
            f"{number}.png": Image.from_numpy(pixels),
            f"{number}.wav": Audio.from_numpy(wave, 8000),
            f"{number}.webp": Video.from_numpy(frames, 4.0),
        }
        for name, medium in media.items():
            medium.save(tmp_path / "media" / name)
            caption = f"a red apple {number}"
            rows.append({"file": name, "modality": medium.modality, "caption": caption})
    (tmp_path / "media" / "pairs.json").write_text(json.dumps(rows))
    return tmp_path / "media" / "pairs.json"


@pytest.fixture
def drawn_curves() -> None:
    """For a test of curves.png or of report.html's panels: `make_run` leaves them as they are."""


@pytest.fixture
def make_run(
    system_tree: dict,
    data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
):
    """`make_run(output="a", steps=3)`: a stage that trains everything on both directions.

    Its curves are not drawn: matplotlib would take longer than all else in a run of a few steps.
    """
    if "drawn_curves" not in request.fixturenames:
        monkeypatch.setattr(report, "panels", lambda _: {})
        monkeypatch.setattr(journal, "plot_curves", lambda file, _: files.atomic_write(file, b""))

    def make(**changes) -> RunConfig:
        both = {
            f"{direction}-{modality}": {
                "type": "pairs",
                "file": str(data),
                "modality": modality,
                "direction": direction,
                "prompts": ["what is this?", "draw"],
            }
            for direction in ("understand", "generate")
            for modality in ("image", "audio", "video")
        }
        stage = {
            "name": "test",
            "learning_rates": {"*_projections.*": 1e-3, "llm.*": 1e-3},
            "losses": {"text": 1.0, "align": 1.0, "denoise": 0.1},
            "data": both,
            "steps": 4,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "precision": "no",
            "save_steps": 2,
            **changes,
            "output": str(tmp_path / changes.get("output", "run")),
        }
        return config.parse_run({"system": system_tree, "stage": stage})

    return make
