"""The tools that make mini's shipped parts: a smoke run of seconds, and the files that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm import mini
from mmllm.data.sources import read_rows
from tools.mini import codec
from tools.mini.data.dialogues.checks import check
from tools.mini.data.dialogues.heldout import tests as heldout_items
from tools.mini.data.dialogues.pairs import pairs
from tools.mini.data.dialogues.world import World
from tools.mini.world import pool

DATA = mini.FOLDER / "data"


def test_a_codec_trains_and_is_saved(tmp_path: Path) -> None:
    """Two steps on eight images."""
    torch.manual_seed(0)
    files = sorted((DATA / "pictures" / "fluent-3d").glob("*.webp"))[:8]
    samples = torch.cat([codec.frames_of(file).transpose(0, 1) for file in files])
    model = codec.codec().train()
    codec.train(model, samples, minutes=1e-6, seed=0)
    deviation, psnr = codec.measure(
        model.eval(), samples.repeat(32, 1, 1, 1), tmp_path / "sheet.png"
    )
    assert 0 < deviation < 100
    assert psnr > 0
    model.register_to_config(scaling_factor=1 / deviation)
    model.save_pretrained(tmp_path / "codec")
    again: Any = pool.image_codec(tmp_path / "codec")
    torch.testing.assert_close(again.state_dict(), dict(model.state_dict()))


def test_pairs_and_tests_are_those_that_ship() -> None:
    world = World.load()
    prompts = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
    for file, made in (
        ("pairs.jsonl.gz", pairs(world)),
        ("tests.jsonl.gz", heldout_items(world, prompts)),
    ):
        shipped, _ = read_rows(str(DATA / file), None, "test")
        assert made == [dict(shipped[number]) for number in range(len(shipped))]


def test_what_ships_for_stages_1_and_2_and_validation_holds_nothing_held_out() -> None:
    world = World.load()
    prompts = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
    files = {}
    for name in ("pairs", "validation", "tests"):
        rows, _ = read_rows(str(DATA / f"{name}.jsonl.gz"), None, "test")
        files[f"{name}.jsonl.gz"] = [dict(rows[number]) for number in range(len(rows))]
    check(world, prompts, files)


def test_sounds_are_synthesised_alike_every_time() -> None:
    pytest.importorskip("scipy")  # of the extra `data`
    from tools.mini.data.sounds.concepts import check_names, concepts
    from tools.mini.data.sounds.rendering import finish
    from tools.mini.data.sounds.synthesised import SYNTHESISED

    check_names(concepts())
    for name in ("owl", "rain"):
        takes = [
            finish(SYNTHESISED[name](0.4, np.random.default_rng(0)).astype(np.float64), name)
            for _ in range(2)
        ]
        np.testing.assert_array_equal(*takes)
        assert takes[0].shape == (32_768,)
        assert 0.5 < np.abs(takes[0]).max() <= 1
