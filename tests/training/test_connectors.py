"""Connectors in training: measured before the first step, trained by denoising alone, reported."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mmllm import checkpoints
from mmllm.training.trainer import train
from tests.projections.conftest import connectors, language_model  # noqa: F401 - a fixture
from tests.training.runs import loss_curve, weights


@pytest.fixture
def system_tree(system_tree: dict, language_model: Path) -> dict:  # noqa: F811
    return {**system_tree, "output_projections": connectors(language_model)}


def options(data: dict, **changes) -> dict:
    return {
        **{"learning_rates": {"output_projections.*": 3e-3, "llm.signal_embeddings": 3e-3}},
        **{"losses": {"denoise": 1.0}, "denoise": {"min_snr": 5.0}, "data": data},
        **{"gradient_accumulation_steps": 1, "batch_size": 8, **changes},
    }


def generating(run) -> dict:
    return {name: entry for name, entry in run.stage.data.items() if name.startswith("generate")}


def test_denoising_alone_trains_a_connector_and_its_gates_are_reported(
    make_run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = generating(make_run())
    with caplog.at_level(logging.INFO, "mmllm"):
        train(make_run(**options(data, steps=40, save_steps=40)), progress=False)
    curve = loss_curve(tmp_path / "run")
    assert sum(curve[-10:]) < sum(curve[:10])
    assert "output_projections.image reads, at signal tokens, the states after layer 1: 0." in (
        caplog.text
    )
    model = checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / "run"))
    for key in ("image", "audio", "video"):
        connector = model.output_projection(key)
        assert not connector.is_new
        empty = model.decoders[key].unconditional(1)
        null = connector.null_condition(1)
        for name, value in null.items():  # begun as the empty caption, and trained since
            assert value.shape == empty[name].shape
            if not name.endswith("mask"):
                assert not value.equal(empty[name])
                assert (value - empty[name]).abs().mean() < 0.2
    assert model.output_projection("image").layer_gates()["signal tokens"][0] != 0.5


def test_alignment_first_and_denoising_after(make_run, tmp_path: Path) -> None:
    data = generating(make_run())
    first = options(data, output="first", steps=2, losses={"align": 1.0}, denoise=None)
    train(make_run(**first, prealign={"steps": 5}), progress=False)
    measured = weights(tmp_path / "first")["output_projections/image.shift"]
    second = options(data, output="second", steps=1, init_from=str(tmp_path / "first"))
    second["learning_rates"] = {"output_projections.*.heads.*": 1e-3}
    train(make_run(**second), progress=False)
    after = weights(tmp_path / "second")
    assert after["output_projections/image.shift"].equal(measured)  # not measured again
    heads = "output_projections/image.heads.prompt_embeds.weight"
    assert not after[heads].equal(weights(tmp_path / "first")[heads])
