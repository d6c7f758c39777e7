"""Directions of few features: those of one thing removed, those of another added."""

from __future__ import annotations

import torch

from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.insight.features.directions import concept_features

SHARED, CAT, DOG = 0, 2, 5


def dictionary() -> SparseAutoencoder:
    """Eight features, which are the coordinates of states."""
    made = SparseAutoencoder(8, 8, Origin("m", "layers.1", "layers.1"))
    made.W_enc.copy_(torch.eye(8))
    made.W_dec.copy_(torch.eye(8))
    made.threshold.fill_(0.1)
    return made


def states(own: int, strength: float) -> list[torch.Tensor]:
    """Two replies of three positions: a feature that all things share, and their own."""
    rows = torch.zeros(2, 3, 8)
    rows[..., SHARED] = 4.0
    rows[:, 1, own] = strength
    rows[:, 2, own] = 2 * strength
    return list(rows)


def test_the_features_of_a_thing_are_put_in_place_of_those_of_another() -> None:
    found = concept_features(dictionary(), {"cat": states(CAT, 1), "dog": states(DOG, 3)}, num=1)
    assert (found["cat"].features, found["dog"].features) == ((CAT,), (DOG,))
    assert found["dog"].activations.tolist() == [[0], [3], [6]]
    direction = found["dog"].instead_of(found["cat"], "layers.1")
    assert direction.site == "layers.1"
    expected = torch.zeros(3, 8)
    expected[:, CAT] = torch.tensor([0.0, -1, -2])
    expected[:, DOG] = torch.tensor([0.0, 3, 6])
    assert torch.equal(direction.vector, expected)
    back = found["cat"].instead_of(found["dog"], "layers.1").vector
    assert torch.equal(back, -direction.vector)


def test_more_features_come_in_the_order_of_their_lead() -> None:
    of_cat = states(CAT, 1)
    for each in of_cat:
        each[:, 7] = 0.5
    found = concept_features(dictionary(), {"cat": of_cat, "dog": states(DOG, 3)}, num=3)
    assert found["cat"].features[:2] == (CAT, 7)
    assert DOG not in found["cat"].features
