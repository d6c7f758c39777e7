"""Where features are active, against the whole matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmllm.insight.activations import KINDS
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.insight.features.activity import FeatureActivity, shared_concepts
from mmllm.insight.features.cards import choose_features
from tests.insight.studies import NUM, measured


def test_activations_are_those_of_the_matrix_from_the_strongest() -> None:
    activity, matrix = measured()
    for feature in range(4):
        rows, values = activity.of(feature)
        expected = matrix[:, feature].sort(descending=True).values
        expected = expected[expected > 0]
        assert torch.allclose(torch.tensor(values), expected)
        assert torch.equal(matrix[rows, feature], torch.tensor(values))
        assert activity.density(feature) == pytest.approx(len(expected) / NUM)
        image = torch.arange(NUM) % 5 == 1
        share = (matrix[image, feature] > 0).float().mean().item()
        assert activity.density_by_kind(feature)["image"] == pytest.approx(share)


def test_massive_states_do_not_count() -> None:
    activity, matrix = measured()
    acts = replace(activity.acts, max_norm=3.0)
    dictionary = SparseAutoencoder(4, 4, Origin("m", "layers.1", "layers.1"))
    dictionary.W_enc.copy_(torch.eye(4))
    rows = FeatureActivity.measure(dictionary, acts).of(0)[0]
    assert set(rows.tolist()) == set(
        ((matrix[:, 0] > 0) & (acts.states.norm(dim=1) <= 3)).nonzero()[:, 0].tolist()
    ) | set(((acts.states[:, 0] > 0) & (acts.states.norm(dim=1) <= 3)).nonzero()[:, 0].tolist())


def test_one_of_a_conversation_is_shown_and_a_file_once() -> None:
    activity, _ = measured()
    shown = activity.strongest(0, "image", 50)
    names = [activity.acts.medium(row).source for row, _ in shown]
    assert len(names) == len(set(names))
    values = [value for _, value in shown]
    assert values == sorted(values, reverse=True)
    texts = activity.strongest(0, "text", 50)
    items = [int(activity.acts.items[row]) for row, _ in texts]
    assert len(items) == len(set(items))
    assert all(activity.acts.kinds[row] == KINDS.index("text") for row, _ in texts)
    assert len(activity.strongest(0, "text", 2)) == 2


def test_the_feature_of_a_concept_is_chosen_first() -> None:
    activity, _ = measured()
    assert {concept for concept, _ in shared_concepts(activity, num=6)[0].values()} == {"b"}
    assert choose_features(activity, 3)[0] == 0
    assert len(set(choose_features(activity, 4))) == 4
