"""Scores against numpy, against sklearn, and at the points whose values are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmllm.data.batch import Batch, collate
from mmllm.features.cache import FeatureCache
from mmllm.insight.dictionary import metrics
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.model import AnyToAny
from tests.insight.conversations import rendered
from tests.insight.tables import table

STATES = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)


def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    centred = (STATES - STATES.mean(0)).numpy()
    _, _, right = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ right[:3].T @ right[:3] + STATES.mean(0).numpy()
    assert np.allclose(metrics.PrincipalComponents(STATES, 3)(STATES), expected, atol=1e-3)


def test_plain_axes_keep_the_largest_coordinates() -> None:
    made = metrics.PlainAxes(torch.zeros(1, 4), 2)(torch.tensor([[1.0, -5.0, 3.0, 0.5]]))
    assert made.tolist() == [[0, -5, 3, 0]]


def test_variance_explained_is_one_of_a_copy_and_zero_of_the_mean() -> None:
    acts = table()
    keep = acts.states[~acts.is_massive].float()
    mean = keep.mean(0)
    copy = metrics.variance_explained(lambda states: states, acts)
    num = len(acts.items[~acts.is_massive].unique())
    assert (copy.value, copy.low, copy.high, copy.n) == (1, 1, 1, num)
    assert metrics.variance_explained(
        lambda states: mean.expand(len(states), -1), acts
    ).value == pytest.approx(0, abs=1e-6)
    half = metrics.variance_explained(lambda states: (states + mean) / 2, acts)
    assert half.value == pytest.approx(0.75, abs=1e-3)
    assert half.low <= half.value <= half.high


def test_the_interval_of_a_ratio_covers_it() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(40):
        denominators = rng.uniform(1, 3, size=60)
        numerators = denominators * rng.uniform(0.4, 0.8, size=60)
        estimate = metrics.ratio_of_sums(numerators, denominators, seed)
        covered += estimate.low <= 0.6 <= estimate.high
    assert 33 <= covered <= 40
    assert np.isnan(metrics.ratio_of_sums(np.zeros(0), np.zeros(0)).value)


def test_density_counts_active_positions() -> None:
    dictionary = SparseAutoencoder(2, 3, Origin("m", "s", "s"))
    dictionary.W_enc.copy_(torch.tensor([[1.0, 0, -1], [0, 1.0, 0]]))
    dictionary.threshold.fill_(0.5)
    states = torch.tensor([[1.0, 0], [2, 1], [-1, 0.2], [0, 0]])
    assert metrics.density(dictionary, states).tolist() == [0.5, 0.25, 0.25]


def test_loss_recovered_is_one_of_a_copy_and_zero_of_the_mean(tiny_model: AnyToAny) -> None:
    conversations, features = rendered(tiny_model, 3), FeatureCache(tiny_model)

    def losses(reconstruct=None, **options) -> metrics.SplicedLosses:
        return metrics.losses(
            tiny_model, conversations, features, "layers.0", reconstruct, **options
        )

    clean = losses()
    expected = []
    for conversation in conversations:
        states = tiny_model.hidden(batch := _batch_of(tiny_model, conversation, features))
        nll = tiny_model.llm.token_nll(states.flatten(0, 1)[batch.target_indices], batch.labels)
        expected.append(nll.sum().item())
    assert np.allclose(clean.nll, expected, atol=1e-3)
    assert clean.mean == pytest.approx(sum(expected) / clean.tokens.sum())
    ablated = losses(lambda states: torch.zeros_like(states))
    assert not np.allclose(ablated.nll, clean.nll, atol=1e-2)
    copied = losses(lambda states: states.clone())
    assert metrics.loss_recovered(clean, copied, ablated).value == pytest.approx(1, abs=1e-3)
    assert metrics.loss_recovered(clean, ablated, ablated).value == 0
    kept = losses(lambda states: torch.zeros_like(states), max_norm=0.0)
    assert np.allclose(kept.nll, clean.nll, atol=1e-3)


def _batch_of(model: AnyToAny, conversation, features) -> Batch:
    return collate([conversation], features, model.batch_layout, targets=False)
