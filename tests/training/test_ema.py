"""The moving average of what trains: saved as the model, resumed exactly, used at inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmllm import checkpoints
from mmllm.errors import CheckpointError, ConfigError
from mmllm.training import callbacks, trainer
from mmllm.training.trainer import train
from tests.training.runs import loss_curve, weights

TABLE = {"output_projections.image.*": 1e-2, "llm.signal_embeddings": 1e-2}


def options(**changes) -> dict:
    return {
        **{"learning_rates": TABLE, "losses": {"align": 1.0, "denoise": 0.1}, "steps": 6},
        **{"ema": {"decay": 0.6}, "save_steps": 3, "gradient_accumulation_steps": 1, **changes},
    }


def test_a_checkpoint_holds_the_averages_and_the_training_goes_on_from_the_rest(
    make_run, tmp_path: Path
) -> None:
    """By hand, from the values that a run without averages saves at each step."""
    train(make_run(output="plain", **options(ema=None, save_steps=1, save_total_limit=9)))
    saved = {step: weights(tmp_path / f"plain/checkpoints/step-{step:08d}") for step in range(1, 7)}
    train(make_run(output="averaged", **options(save_steps=6)), progress=False)
    averaged = weights(tmp_path / "averaged")
    assert loss_curve(tmp_path / "averaged") == loss_curve(tmp_path / "plain")
    name = "output_projections/image.inward.weight"
    wanted = saved[1][name]
    for step in range(2, 7):
        decay = min(0.6, (1 + step - 1) / (10 + step - 1))
        wanted = decay * wanted + (1 - decay) * saved[step][name]
    torch.testing.assert_close(averaged[name], wanted, rtol=1e-5, atol=1e-7)
    assert not averaged[name].equal(saved[6][name])
    trained = averaged["optimizer/trained/output_projections.image.inward.weight"]
    assert trained.equal(saved[6][name])
    loaded = checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / "averaged"))
    used = loaded.output_projections["image"].inward.weight
    assert used.equal(averaged[name])


def test_resume_equals_a_run_that_never_stopped(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_run(output="whole", **options()), progress=False)
    step, taken = trainer.training_step, []

    def killed(*arguments, **named):
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*arguments, **named)

    monkeypatch.setattr(trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(make_run(output="parts", **options()), progress=False)
    monkeypatch.setattr(trainer, "training_step", step)
    assert checkpoints.open_checkpoint(tmp_path / "parts").step == 3
    train(make_run(output="parts", **options()), resume=True, progress=False)
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert value.equal(parts[name]), name
    with pytest.raises(ConfigError, match=r"cannot resume with another stage.ema"):
        train(make_run(output="parts", **options(ema=None)), resume=True, progress=False)


def test_held_out_losses_and_the_best_model_are_of_the_averages(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**options())
    data = {name: entry for name, entry in run.stage.data.items() if name == "generate-image"}
    validate, seen = callbacks.validate, []

    def watched(accelerator, model, *arguments, **named):
        seen.append(model.output_projections["image"].inward.weight.detach().clone())
        return validate(accelerator, model, *arguments, **named)

    monkeypatch.setattr(callbacks, "validate", watched)
    validation = {"data": data, "every": 6, "batches": 1}
    held_out = make_run(**options(validation=validation, best="validation/align/image"))
    train(held_out, progress=False)
    name = "output_projections/image.inward.weight"
    assert seen[-1].equal(weights(tmp_path / "run")[name])
    assert seen[-1].equal(weights(tmp_path / "run" / "best")[name])


def test_a_training_state_without_trained_values_is_refused(make_run, tmp_path: Path) -> None:
    from mmllm.training.ema import MovingAverage
    from mmllm.training.trainable import ParameterGroup

    parameter = torch.nn.Parameter(torch.zeros(2))
    groups = [ParameterGroup("a.*", 1e-3, {"a.b": parameter})]
    average = MovingAverage(make_run(**options()).stage.ema, groups)
    with pytest.raises(CheckpointError, match=r"no trained value of 'a.b'"):
        average.load_trained({}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": {"decay": 1.5}}, "stage.ema.decay: expected between 0 and 1, got 1.5"),
        ({"realign": {"steps": 1}}, "stage.realign trains after the last step"),
        ({"denoise": {"times": "shifted"}, "losses": {"align": 1.0}}, "stage.denoise describes"),
        ({"denoise": {"std": 0.0}}, "stage.denoise.std: expected above 0, got 0"),
        ({"denoise": {"min_snr": -1.0}}, "stage.denoise.min_snr: expected above 0, got -1"),
    ],
)
def test_invalid_settings_are_refused(make_run, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run(**options(**changes))
