"""Stages that start from a model that knows names: they keep them, whatever their config says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm import checkpoints, config
from mmllm.checkpoints import load_model, open_checkpoint
from mmllm.conversation import Image
from mmllm.data.formats.labelled import LabelledMedium
from mmllm.errors import CheckpointError
from mmllm.training import trainer
from mmllm.training.swapping import SwapOptions, swap_decoders
from mmllm.training.teaching import TeachingOptions
from tools.mini import names

CTC = {
    **{"type": "ctc", "num_tokens": 8, "steps": 12, "vocabulary": 60},
    **{"width": 8, "heads": 2, "layers": 1},
}
COLOURS = {"apple": (250, 20, 20), "rocket": (20, 20, 240), "violin": (20, 240, 20)}


def media(*labels: str) -> list[LabelledMedium]:
    """An image of each label, as ColourEncoder tells them from one another."""
    pixels = {
        label: np.repeat(np.tile(np.uint8(COLOURS[label]), 4), 16).reshape(8, 8, 3)
        for label in labels
    }
    return [
        LabelledMedium(replace(Image.from_numpy(value), caption=f"a red {label}"), label)
        for label, value in pixels.items()
    ]


@pytest.fixture
def system(system_tree: dict) -> config.SystemConfig:
    """The tiny system, which spells images and knows no names."""
    projections = {**system_tree["input_projections"], "image": CTC}
    return config.parse_system({**system_tree, "input_projections": projections})


@pytest.fixture
def named(make_run: Any, system: config.SystemConfig, tmp_path: Path) -> Path:
    """A run of one step that was taught two names."""
    run = make_run(output="first", steps=1)
    first = trainer.train(replace(run, system=system), progress=False)
    options = TeachingOptions(steps=300, batch_size=8, learning_rate=3e-2)
    (lesson,) = names.teach(
        first,
        tmp_path / "named",
        media("apple", "rocket"),
        rehearse=media("violin"),
        options=options,
        progress=False,
    )
    assert (lesson.new, lesson.known) == (["a red apple", "a red rocket"], [])
    assert (lesson.accuracy, lesson.kept) == (1.0, 1.0)
    return tmp_path / "named"


def spelled(model: Any, item: LabelledMedium) -> str:
    """What the model reads a medium as."""
    encoder, projection = model.encoders["image"], model.input_projections["image"]
    tokens = encoder(encoder.preprocess(item.medium)[None]).tokens
    return model.llm.tokenizer.decode(projection.spell(tokens)[0])


def test_a_stage_keeps_the_names_that_it_starts_from(
    named: Path, make_run: Any, system: config.SystemConfig
) -> None:
    assert [spelled(load_model(open_checkpoint(named)), item) for item in media("apple")] == [
        " a red apple"
    ]
    run = make_run(output="second", steps=2, save_steps=1, init_from=str(named))
    run = replace(run, system=system)
    second = trainer.train(run, progress=False)
    longer = replace(run, stage=replace(run.stage, steps=3))
    trainer.train(longer, resume=True, progress=False)
    found = open_checkpoint(second)
    assert found.step == 3
    for written in (
        found.system(),
        config.parse_run(config.read_yaml(second / "config.yaml")).system,
    ):
        assert written.input_projections["image"].names == 2
    before, after = load_model(open_checkpoint(named)), load_model(found)
    for item in media("apple", "rocket"):
        assert spelled(after, item) == f" {item.medium.caption}"
    old, new = (model.input_projections["image"].state_dict() for model in (before, after))
    same = {name for name, value in new.items() if torch.equal(value, old[name])}
    assert {"name_ids", "namer.weight", "namer.bias"} <= same
    assert "rest" not in same


def test_names_of_another_type_of_projection_are_not_taken(
    named: Path, make_run: Any, system_tree: dict
) -> None:
    run = make_run(output="second", steps=1, init_from=str(named))
    with pytest.raises(CheckpointError, match="expected"):
        trainer.train(run, progress=False)


def test_swapped_and_merged_models_keep_their_names(named: Path, tmp_path: Path) -> None:
    source = open_checkpoint(named)
    decoders = {"image": source.system().decoders["image"]}
    swap_decoders(
        source, decoders, tmp_path / "swapped", options=SwapOptions(steps=1), progress=False
    )
    checkpoints.merge(source, tmp_path / "merged", dtype=torch.float32)
    for name in ("swapped", "merged"):
        model = load_model(open_checkpoint(tmp_path / name))
        assert model.config.input_projections["image"].names == 2
        assert [spelled(model, item) for item in media("rocket")] == [" a red rocket"]
