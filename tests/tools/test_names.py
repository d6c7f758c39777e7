"""The tool that teaches the names of mini's own single media, on a tiny model and a few of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmllm import checkpoints
from mmllm.checkpoints import load_model, open_checkpoint
from mmllm.training import rehearsal
from mmllm.training.teaching import TeachingOptions
from tools.mini import names

CTC = {
    **{"type": "ctc", "num_tokens": 24, "steps": 24, "vocabulary": 60},
    **{"width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six media of each modality, two scenes, and one step."""
    singles, scenes = names.single_things, names.scenes
    monkeypatch.setattr(names, "single_things", lambda modality: singles(modality)[:6])
    monkeypatch.setattr(names, "scenes", lambda modality, count: scenes(modality, 2))
    monkeypatch.setattr(names, "placed", lambda count: singles("image")[:1])
    monkeypatch.setattr(names, "OPTIONS", TeachingOptions(steps=1))


def test_one_command_teaches_the_names_of_whatever_a_run_spells(
    few: None,
    make_model: Any,
    system_tree: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = {**system_tree["input_projections"], "image": CTC, "audio": CTC}
    run = checkpoints.save(tmp_path / "run", make_model(input_projections=kinds), step=0)
    assert names.modalities(run) == ["image"]
    monkeypatch.setattr(sys, "argv", ["names", str(run), str(tmp_path / "out")])
    names.main()
    taught = open_checkpoint(tmp_path / "out")
    decode = load_model(taught).llm.tokenizer.decode
    captions = dict.fromkeys(item.medium.caption for item in rehearsal.single_things("image")[:6])
    projection: Any = load_model(taught).input_projections["image"]
    assert [decode(name) for name in projection.names()] == [f" {each}" for each in captions]
    assert checkpoints.saved_names(taught) == {"image": 6}

    singles = names.single_things
    monkeypatch.setattr(names, "single_things", lambda modality: singles(modality)[3:5])
    for options, expected in (([], 6), (["--anew"], 3)):  # two and the one that is placed
        arguments = ["names", str(tmp_path / "out"), str(tmp_path / "again"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        names.main()
        assert checkpoints.saved_names(open_checkpoint(tmp_path / "again"))["image"] == expected


def test_what_is_taught_by_default_is_what_training_may_see() -> None:
    styles = {Path(str(item.medium.source)).parent.name for item in names.single_things("image")}
    assert styles == {"fluent-3d", "fluent-flat", "noto"}
    counts = {
        modality: len({item.medium.caption for item in names.single_things(modality)})
        for modality in ("image", "audio", "video")
    }
    assert counts == {"image": 351, "audio": 80, "video": 129}


def test_placed_pictures_have_the_names_of_single_ones() -> None:
    own = {(item.medium.caption, item.label) for item in names.single_things("image")}
    found = names.placed(20)
    assert {(item.medium.caption, item.label) for item in found} <= own
    assert len({np.asarray(item.medium).tobytes() for item in found}) == 20
