"""The tools that make mini's shipped parts: a smoke run of seconds, and the files that ship."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import BertConfig, BertModel, BertTokenizer

from mmllm import mini
from mmllm.data.sources import read_rows
from tools.mini import codec
from tools.mini.data.dialogues.checks import check
from tools.mini.data.dialogues.heldout import tests as heldout_items
from tools.mini.data.dialogues.pairs import pairs
from tools.mini.data.dialogues.world import World
from tools.mini.decoders import __main__ as decoders
from tools.mini.decoders.items import Items, read_items, training_batch
from tools.mini.decoders.samples import score
from tools.mini.decoders.table import DECODERS

DATA = mini.FOLDER / "data"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random sentence encoder in the layout of all-MiniLM-L6-v2."""
    folder = tmp_path_factory.mktemp("words")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *("a", "dog", "cat", "of", "sound", "the")]
    vocabulary += [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(12)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=144,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained_codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The codec after two steps on eight images."""
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    files = sorted((DATA / "pictures" / "fluent-3d").glob("*.webp"))[:8]
    samples = torch.cat([codec.frames_of(file).transpose(0, 1) for file in files])
    model = codec.codec().train()
    codec.train(model, samples, minutes=1e-6, seed=0)
    deviation, psnr = codec.measure(model.eval(), samples.repeat(32, 1, 1, 1), folder / "sheet.png")
    assert 0 < deviation < 100
    assert psnr > 0
    model.register_to_config(scaling_factor=1 / deviation)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("decoder", ["image", "audio"])
def test_a_decoder_trains_resumes_and_ships(
    decoder: str,
    words: Path,
    trained_codec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps on six items: one, then another after a restart; then the shipped pipeline."""
    recipe = DECODERS[decoder]
    recipe = replace(recipe, batch=2, call={**recipe.call, "num_inference_steps": 2})
    monkeypatch.setitem(DECODERS, decoder, recipe)
    everything = read_items(DATA, decoder, lambda path: recipe.read(DATA / _first(decoder)))
    names = everything.captions.names[:3]
    captions = type(everything.captions)(everything.captions.train, ["{caption}"], names)
    items = Items(everything.samples[:3], [0, 1, 2], everything.labels[:3], captions)
    monkeypatch.setattr(decoders, "read_items", lambda *_: items)
    run = tmp_path / "run"
    start = ["--words", str(words), "--codec", str(trained_codec), "--steps", "2"]

    def tool(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["decoders", decoder, "--run", str(run), *arguments])
        decoders.main()

    tool(*start)
    progress = json.loads((run / "progress.json").read_text())
    assert progress["step"] == 2
    assert (run / "samples-2.png").is_file()
    tool("--resume")  # it is complete already
    assert json.loads((run / "progress.json").read_text())["step"] == 2

    shipped = tmp_path / "shipped"
    tool("--ship", str(shipped))
    assert f"tools.mini.decoders {decoder}" in (shipped / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(shipped)
    pipe.set_progress_bar_config(disable=True)
    assert score(pipe, recipe, items, rounds=1)["samples"] == 3


def _first(decoder: str) -> str:
    rows, _ = read_rows(str(DATA / "pairs.jsonl.gz"), None, "test")
    return next(row["file"] for row in rows if row["modality"] == decoder)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    captions = read_items(DATA, "audio", lambda _: torch.zeros(1)).captions
    items = Items(torch.zeros(4), [0, 0, 1, 2], ["a", "b", "c"], captions)
    first, again = (training_batch(DECODERS["audio"], items, 7, 3) for _ in range(2))
    assert first[:2] == again[:2]
    assert training_batch(DECODERS["audio"], items, 8, 3)[:2] != first[:2]


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
