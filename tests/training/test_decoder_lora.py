"""A LoRA of a decoder: trained by denoising, resumed, saved as diffusers reads it, planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm import checkpoints, config
from mmllm import model as models
from mmllm.checkpoints.contents import lora_file
from mmllm.decoders.adapters import decoder_lora
from mmllm.decoders.options import denoisers
from mmllm.errors import CheckpointError, ConfigError
from mmllm.planning.parts import parts_of
from mmllm.planning.planner import plan_stage
from mmllm.training import trainer
from mmllm.training.trainable import choose_trainable
from mmllm.training.trainer import train
from mmllm.weights import save_tensors
from tests.decoders import tiny
from tests.decoders.comparing import arrays, seeded, training_inputs
from tests.decoders.conftest import Folders
from tests.training.runs import loss_curve, weights

RANK = 2
TABLE = {"decoders.image.lora.*": 3e-2}


@pytest.fixture
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture
def system_tree(system_tree: dict, folders: Folders) -> dict:
    """The system of all tests, with images by Stable Diffusion 3."""
    image = config.dump(tiny.entry("sd3", folders["sd3"], train_lora={"rank": RANK}))
    return {**system_tree, "decoders": {**system_tree["decoders"], "image": image}}


def images(run: Any) -> dict:
    return {"generate-image": run.stage.data["generate-image"]}


def options(make_run: Any, **changes: Any) -> dict[str, Any]:
    return {
        "learning_rates": TABLE,
        "losses": {"denoise": 1.0},
        "data": images(make_run()),
        "gradient_accumulation_steps": 1,
        **changes,
    }


def load(folder: Path) -> Any:
    return checkpoints.load_model(checkpoints.open_checkpoint(folder))


def sampled(decoder: Any, condition: dict | None = None) -> np.ndarray:
    condition = condition or decoder.encode_captions(["a red apple"])
    return arrays(decoder.sample(condition, generators=seeded(0)))


def test_denoising_trains_it_and_nothing_else(make_run, tmp_path: Path) -> None:
    train(make_run(**options(make_run, steps=40, save_steps=40)), progress=False)
    curve = loss_curve(tmp_path / "run")
    assert sum(curve[-10:]) < 0.99 * sum(curve[:10])
    model = load(tmp_path / "run")
    decoder, fresh = model.decoders["image"], models.build(make_run().system).decoders["image"]
    trained = dict(decoder.lora.named_weights())
    assert all(value.any() for name, value in trained.items() if ".lora_B." in name)
    own = dict(denoisers(fresh.pipeline)[0].named_parameters())
    found = 0
    for name, value in denoisers(decoder.pipeline)[0].named_parameters():
        if "lora_" not in name:
            found += 1
            assert torch.equal(value, own[name.replace(".base_layer", "")])
    assert found == len(own)
    assert np.abs(sampled(decoder) - sampled(fresh)).max() > 1e-3
    assert decoder.fingerprint == fresh.fingerprint


def test_resume_equals_a_run_that_never_stopped(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = {**TABLE, "output_projections.image.*": 1e-3}
    base = options(make_run, learning_rates=mixed, steps=4, save_steps=2)
    train(make_run(**base, output="whole"), progress=False)
    step, taken = trainer.training_step, []

    def killed(*arguments: Any, **kwargs: Any) -> Any:
        if len(taken) == 3:  # after the checkpoint of step 2
            raise KeyboardInterrupt
        taken.append(1)
        return step(*arguments, **kwargs)

    monkeypatch.setattr(trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(make_run(**base, output="parts"), progress=False)
    monkeypatch.setattr(trainer, "training_step", step)
    assert checkpoints.open_checkpoint(tmp_path / "parts").step == 2
    train(make_run(**base, output="parts"), resume=True, progress=False)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert any("lora_B" in name and value.any() for name, value in whole.items())
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_a_checkpoint_is_read_by_the_pipeline_itself(make_run, tmp_path: Path) -> None:
    """Loaded by diffusers: the same media as from the checkpoint."""
    train(make_run(**options(make_run, steps=6)), progress=False)
    file = checkpoints.open_checkpoint(tmp_path / "run").folder / lora_file("image")
    decoder = load(tmp_path / "run").decoders["image"]
    plain = models.build(make_run().system).decoders["image"]
    condition = decoder.encode_captions(["a red apple"])
    made = sampled(decoder, condition)
    assert np.abs(made - sampled(plain, condition)).max() > 1e-3
    plain.pipeline.load_lora_weights(str(file.parent))  # finds the file by its name
    np.testing.assert_allclose(made, sampled(plain, condition), rtol=0, atol=1e-4 + 1 / 255)


@pytest.mark.parametrize("family", ["sd3", "flux", "stable_diffusion", "z_image"])
def test_a_saved_one_is_loaded_by_load_lora_weights(
    family: str, folders: Folders, tmp_path: Path
) -> None:
    """Of pipelines that have this method. A fresh one changes nothing; gradients reach it."""
    entry = tiny.entry(family, folders[family], train_lora={"rank": RANK})
    decoder = config.build(entry)
    plain = config.build(tiny.entry(family, folders[family]))
    condition = plain.encode_captions(["a red apple"])
    decoder_lora(decoder, "decoders.image", torch.device("cpu"))
    assert np.array_equal(sampled(decoder, condition), sampled(plain, condition))
    decoder.lora.requires_grad_(True)
    latents, noising = training_inputs(plain, 1)
    decoder.denoising_loss(condition, latents, **noising).sum().backward()
    for name, weight in decoder.lora.named_weights():
        assert weight.grad is not None, name
        assert weight.grad.any() or ".lora_A." in name  # B is zero, so A has no gradient yet
        torch.nn.init.normal_(weight.data, std=0.3)
    decoder.lora.requires_grad_(False)
    save_tensors(dict(decoder.lora.named_weights()), tmp_path / "pytorch_lora_weights.safetensors")
    made = sampled(decoder, condition)
    assert np.abs(made - sampled(plain, condition)).max() > 1e-3
    plain.pipeline.load_lora_weights(str(tmp_path))
    np.testing.assert_allclose(made, sampled(plain, condition), rtol=0, atol=1e-4 + 1 / 255)
    merged = config.build(
        tiny.entry(family, folders[family], lora=str(tmp_path / "pytorch_lora_weights.safetensors"))
    )
    np.testing.assert_allclose(made, sampled(merged, condition), rtol=0, atol=1e-4 + 1 / 255)


def test_it_is_planned_without_weights(make_run) -> None:
    run = make_run(**options(make_run))
    model = models.build(run.system, meta=True)
    plan = plan_stage(model, run)
    (part,) = (part for part in parts_of(model) if part.name == "decoders.image.lora")
    real = models.build(run.system)
    groups = choose_trainable(real, run.stage.learning_rates)
    assert part.trained
    assert part.parameters == sum(group.size for group in groups) > 0
    assert plan.memory["optimizer"] == 8 * groups[0].size


def test_what_cannot_be_trained_is_refused(make_run, system_tree, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only the loss denoise trains a decoder's LoRA"):
        train(make_run(**options(make_run, losses={"align": 1.0})), progress=False)
    audio = options(make_run, learning_rates={"decoders.audio.lora.*": 1e-3}, output="audio")
    with pytest.raises(ConfigError, match=r"decoders.audio.train_lora is null"):
        train(make_run(**audio), progress=False)
    train(make_run(**options(make_run, steps=2, output="trained")), progress=False)
    for changes, message in (
        ({"train_lora": {"rank": RANK, "targets": ["nothing"]}}, r"train_lora.targets: nothing"),
        ({"train_lora": {"rank": RANK}, "compile": True}, "needs the weights as they are"),
    ):
        system_tree["decoders"]["image"] |= changes
        with pytest.raises(ConfigError, match=message):
            train(make_run(**options(make_run, output="refused")), progress=False)
        system_tree["decoders"]["image"] |= {"compile": False, "train_lora": {"rank": RANK}}
    system_tree["decoders"]["image"]["train_lora"] = {"rank": RANK + 1}
    start = str(tmp_path / "trained")
    with pytest.raises(CheckpointError, match="lora"):
        train(make_run(**options(make_run, output="other", init_from=start)), progress=False)
