"""Training finds known features, resumes exactly, and keeps what its config says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmllm.errors import ConfigError, TrainingError
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder, random_directions
from mmllm.insight.dictionary.synthetic import RECOVERED, KnownFeatures
from mmllm.insight.dictionary.training import (
    DictionaryConfig,
    Kind,
    train_dictionary,
)

NUM, WIDTH, DIM = 48, 64, 24
TRUTH = KnownFeatures.draw(NUM, DIM, active=2.0)
SMALL = DictionaryConfig(width=WIDTH, k=2, steps=250, batch_size=128, learning_rate=5e-3)


def trained(config: DictionaryConfig, **options) -> SparseAutoencoder:
    sample = TRUTH.sample(config.batch_size)
    return train_dictionary(config, sample, TRUTH.origin, progress=False, **options)


@pytest.mark.parametrize("kind", ["batch_topk", "topk", "matryoshka", "jumprelu"])
def test_known_features_are_found_and_k_are_active(kind: Kind) -> None:
    dictionary = trained(replace(SMALL, kind=kind))
    found = (TRUTH.recovered(dictionary.W_dec) > RECOVERED).float().mean().item()
    by_chance = random_directions(WIDTH, DIM, torch.Generator().manual_seed(1))
    assert (TRUTH.recovered(by_chance) > RECOVERED).float().mean().item() < 0.1
    assert found > 0.25
    states = TRUTH.states(2000, seed=10**6)
    active = (dictionary.encode(states) > 0).float().sum(dim=1).mean().item()
    assert active == pytest.approx(2, rel=0.1)  # of 1,024 states
    error = (states - dictionary(states)).square().sum() / (states - states.mean(0)).square().sum()
    assert error < 0.3
    assert torch.allclose(dictionary.W_dec.norm(dim=1), torch.ones(WIDTH), atol=1e-5)


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_thresholds_hold_on_states_that_nothing_was_trained_on(kind: Kind) -> None:
    """Trained on few states, a dictionary is active more often on others."""
    few = TRUTH.states(200, seed=7)

    def sample(step: int):
        rng = torch.Generator().manual_seed(step)
        states = few[torch.randint(len(few), (128,), generator=rng)]
        return states, states

    def num_active(**options) -> float:
        config = replace(SMALL, kind=kind)
        dictionary = train_dictionary(config, sample, TRUTH.origin, progress=False, **options)
        states = TRUTH.states(8000, seed=10**6)
        return (dictionary.encode(states) > 0).float().sum(dim=1).mean().item()

    assert num_active() > 2.2
    assert num_active(held_out=TRUTH.sample(1024)) == pytest.approx(2, rel=0.05)


def test_a_frozen_decoder_is_as_it_was_drawn_and_worse() -> None:
    frozen = trained(replace(SMALL, decoder="frozen"))
    drawn = random_directions(WIDTH, DIM, torch.Generator().manual_seed(SMALL.seed))
    assert torch.equal(frozen.W_dec, drawn)
    assert (TRUTH.recovered(frozen.W_dec) > RECOVERED).float().mean().item() < 0.1


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    config = replace(SMALL, steps=30)
    whole = trained(config)
    sample, calls = TRUTH.sample(config.batch_size), []

    def stopping(step: int):
        calls.append(step)
        if step == 25 and calls.count(25) == 1:
            raise KeyboardInterrupt
        return sample(step)

    def run() -> SparseAutoencoder:
        return train_dictionary(
            config, stopping, TRUTH.origin, folder=tmp_path, save_every=10, progress=False
        )

    with pytest.raises(KeyboardInterrupt):
        run()
    again = run()
    assert calls.count(5) == 1
    assert calls.count(21) == 2
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert list(tmp_path.iterdir()) == []


def test_a_saved_state_of_another_config_is_not_used(tmp_path: Path) -> None:
    def fail(step: int):
        if step == 15:
            raise KeyboardInterrupt
        return TRUTH.sample(64)(step)

    config = replace(SMALL, steps=20, batch_size=64)
    with pytest.raises(KeyboardInterrupt):
        train_dictionary(config, fail, TRUTH.origin, folder=tmp_path, save_every=5, progress=False)
    other = replace(config, learning_rate=1e-4)
    assert torch.equal(trained(other, folder=tmp_path, save_every=5).W_dec, trained(other).W_dec)


def test_a_transcoder_predicts_other_states() -> None:
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5))).Q

    def sample(step: int):
        states = TRUTH.states(256, seed=step)
        return states + 1, 3 * states @ turn[:, :16] - 2

    origin = Origin("m", "layers.0.mlp", "layers.1")
    dictionary = train_dictionary(SMALL, sample, origin, progress=False)
    inputs, outputs = sample(10**6)
    predicted = dictionary(inputs)
    assert predicted.shape == outputs.shape
    error = (predicted - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum()
    assert error < 0.3


def test_features_that_died_come_back_by_the_auxiliary_loss() -> None:
    def num_dead(auxiliary: float) -> int:
        config = replace(SMALL, width=128, steps=200, dead_after=10, auxiliary=auxiliary)
        features = trained(config).encode(TRUTH.states(4000, seed=10**6))
        return int(((features > 0).sum(dim=0) == 0).sum())

    assert num_dead(1.0) < num_dead(0.0) / 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "lasso"}, "unknown kind 'lasso'; known are batch_topk, topk, matryoshka"),
        ({"k": 0}, r"dictionary\.k: expected at least 1, got 0"),
        ({"k": 200}, "200 active features of 64; choose a larger width"),
    ],
)
def test_a_wrong_config_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **wrong)


def test_a_loss_that_is_not_finite_ends_training() -> None:
    def sample(step: int):
        states = TRUTH.states(64, seed=step)
        return (states, states * (torch.nan if step == 3 else 1.0))

    with pytest.raises(TrainingError, match=r"loss of step 3 is not finite; lower learning_rate"):
        train_dictionary(SMALL, sample, Origin("m", "a", "b"), progress=False)
