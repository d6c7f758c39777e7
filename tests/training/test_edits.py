"""Editing pairs: what a row becomes, and that the source's latents reach the denoising loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm.conversation import Image, Text, assistant, user
from mmllm.data.batch import collate
from mmllm.errors import ConfigError, MediaError
from mmllm.features.cache import LATENTS, FeatureCache
from mmllm.losses import Denoise
from mmllm.training.trainer import train
from tests.data.files import source
from tests.decoders import tiny
from tests.training.runs import loss_curve, weights

NUM = 4


@pytest.fixture
def edits(tmp_path: Path) -> str:
    """A file of editing pairs; the first row has two sources."""
    rng, rows = np.random.default_rng(0), []
    for number in range(NUM):
        for name in ("from", "to"):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.from_numpy(pixels).save(tmp_path / f"{name}{number}.png")
        row = {"source": f"from{number}.png", "target": f"to{number}.png"}
        rows.append({**row, "instruction": f"make it red {number}", "shows": "a red apple"})
    rows[0]["source"] = ["from0.png", "from1.png"]
    (tmp_path / "edits.json").write_text(json.dumps(rows))
    return str(tmp_path / "edits.json")


@pytest.fixture
def system_tree(system_tree: dict, tmp_path: Path) -> dict:
    """The tiny system, which draws by a FLUX.2 with references."""
    tree = {"type": "flux2", "weights": str(tiny.save("flux2", tmp_path / "flux2")), "steps": 2}
    tree |= {"max_caption_tokens": tiny.TOKENS, "height": 64, "width": 64, "references": "auto"}
    return {**system_tree, "decoders": {**system_tree["decoders"], "image": tree}}


def test_a_row_is_the_pictures_the_instruction_and_the_picture_they_become(edits: str) -> None:
    data = source("edits", file=edits, caption="shows", reply="Here:")
    rng = np.random.default_rng(0)
    asked, answer = data.conversation(0, rng)
    assert [Path(medium.source).name for medium in asked.media] == ["from0.png", "from1.png"]
    assert asked.text == "make it red 0"
    assert answer.parts[0] == Text("Here:")
    assert Path(answer.media[0].source).name == "to0.png"
    assert answer.media[0].caption == "a red apple"
    plain = source("edits", file=edits).conversation(1, rng)
    assert [len(message.parts) for message in plain] == [2, 1]
    assert plain[1].media[0].caption == "make it red 1"
    with pytest.raises(ConfigError, match="no row has a field 'edited'"):
        source("edits", file=edits, target="edited")


def test_rows_that_are_no_edits_are_errors_of_the_row(tmp_path: Path) -> None:
    whole = {"source": "a.png", "target": "b.png", "instruction": "red"}
    rows = [whole, {**whole, "source": []}, {**whole, "target": ["b.png", "c.png"]}]
    rows += [{**whole, "instruction": " "}, {**whole, "source": "../a.png"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = source("edits", file=str(tmp_path / "rows.json"))
    for index, wrong in enumerate(
        ("expected pictures in 'source'", "got 1 and 2", "is empty", "outside"), start=1
    ):
        with pytest.raises(MediaError, match=wrong):
            data.conversation(index, np.random.default_rng(0))


def test_the_sources_latents_reach_the_denoising_loss(make_model, edits: str) -> None:
    model, data = make_model(), source("edits", file=edits)
    decoder, rng = model.decoders["image"], np.random.default_rng(0)
    items = [model.renderer.render(data.conversation(index, rng)) for index in range(2)]
    cache = FeatureCache(model, denoise=True)
    batch = collate(items, cache, model.batch_layout)
    media = batch.outputs["image"]
    assert media.num_references == (2, 1)
    assert media.references is not None
    for number, medium in enumerate(data.conversation(0, rng)[0].media):
        own = decoder.encode_media(decoder.preprocess(medium)[None])[0]
        torch.testing.assert_close(media.references[0][number], own)
    loss = Denoise("image", 1.0, decoder, model.output_projection("image"))
    with torch.no_grad():
        output = model(batch)
        given = loss.compute(output, batch).total
        media.reference_latents = torch.zeros_like(media.reference_latents)
        assert (loss.compute(output, batch).total - given).abs() > 1e-4
        media.reference_latents = None
        assert (loss.compute(output, batch).total - given).abs() > 1e-4
    # Of these items all is in the cache, and of another one the latents of its source lack too.
    assert [cache.missing(item) for item in items] == [[], []]
    fresh = FeatureCache(model, denoise=True)
    names = [name for name in fresh.missing(items[0]) if name.startswith(f"{LATENTS}/image")]
    assert len(names) == 3
    fresh.precompute(items, progress=False)
    assert [fresh.missing(item) for item in items] == [[], []]


def test_the_picture_that_a_video_begins_with_reaches_the_loss(
    make_model, system_tree: dict, tmp_path: Path
) -> None:
    """As pixels, through the cache; where the conversation has none, the error names what lacks."""
    tiny.wan_i2v_pipeline().save_pretrained(tmp_path / "wan")
    tree = {"type": "wan_i2v", "weights": str(tmp_path / "wan"), "steps": 2}
    tree |= {"max_caption_tokens": tiny.TOKENS, **tiny.CLIPS}
    model = make_model(decoders={**system_tree["decoders"], "video": tree})
    decoder, first = model.decoders["video"], tiny.medium("image")
    video = replace(tiny.medium("video"), caption="a dog runs .")
    items = [
        model.renderer.render([user("make it run", *given), assistant(video)])
        for given in ([first], [])
    ]
    loss = Denoise("video", 1.0, decoder, model.output_projection("video"))
    losses = []
    for item in items:
        cache = FeatureCache(model, denoise=True)
        batch = collate([item], cache, model.batch_layout)
        media = batch.outputs["video"]
        if media.references is None:
            with (
                torch.no_grad(),
                pytest.raises(ConfigError, match="no picture in front of a video"),
            ):
                loss.compute(model(batch), batch)
            continue
        assert torch.equal(media.references[0][0], decoder.preprocess(first))
        with torch.no_grad():
            output = model(batch)
            losses.append(loss.compute(output, batch).total)
            media.reference_latents = -media.reference_latents
            losses.append(loss.compute(output, batch).total)
    assert (losses[0] - losses[1]).abs() > 1e-5


def test_a_decoder_without_references_trains_on_edits_as_on_pairs(make_model, system_tree, edits):
    tree = {**system_tree["decoders"]["image"], "references": "none"}
    model = make_model(decoders={**system_tree["decoders"], "image": tree})
    messages = source("edits", file=edits).conversation(0, np.random.default_rng(0))
    item = model.renderer.render(messages)
    assert [span.references for span in item.outputs] == [()]
    batch = collate([item], FeatureCache(model, denoise=True), model.batch_layout)
    assert batch.outputs["image"].references is None


def test_a_stage_trains_on_edits(make_run, edits: str, tmp_path: Path) -> None:
    """And the references are of consequence: without them the losses are others."""
    curves: list[Any] = []
    for choice in ("auto", "none"):
        run = make_run(
            output=choice,
            losses={"denoise": 1.0, "text": 1.0},
            data={"edits": {"type": "edits", "file": edits}},
            steps=12,
            save_steps=12,
            gradient_accumulation_steps=1,
        )
        decoder = replace(run.system.decoders["image"], references=choice)
        decoders = {**run.system.decoders, "image": decoder}
        run = replace(run, system=replace(run.system, decoders=decoders))
        train(run, progress=False)
        curves.append(loss_curve(tmp_path / choice))
        assert sum(curves[-1][-4:]) < sum(curves[-1][:4])
    assert curves[0] != curves[1]
    assert weights(tmp_path / "auto").keys() == weights(tmp_path / "none").keys()
