"""The defects of the row `insight/anomaly`, and its figures against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmllm import mini
from mmllm.evaluation.anomalies import (
    auroc,
    auroc_error,
    clip_set,
    picture_set,
    raw_distance,
    sound_set,
    spread,
)

DATA = mini.locate("data")


def test_auroc_is_that_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    for _ in range(5):
        odd, normal = draw.integers(2, 9, 30).tolist(), draw.integers(0, 7, 20).tolist()
        wanted = roc_auc_score([1] * 30 + [0] * 20, odd + normal)
        assert auroc(odd, normal) == pytest.approx(wanted)
    assert auroc_error(0.5, 100, 100) == pytest.approx(0.041, abs=1e-3)


def test_a_picture_differs_from_a_normal_one_where_it_says() -> None:
    bank, normal, odd, places = picture_set(DATA, "dog", np.random.default_rng(0))
    assert [len(part) for part in (bank, normal, odd, places)] == [8, 8, 12, 12]
    for picture, place in zip(odd, places, strict=True):
        assert picture.to_numpy().shape[:2] == place.shape
        assert 20 <= place.sum() <= 16 * 16
    hole = odd[0].to_numpy()[places[0]]
    assert (hole == 255).all()
    again = picture_set(DATA, "dog", np.random.default_rng(0))[2]
    assert all(np.array_equal(a.to_numpy(), b.to_numpy()) for a, b in zip(odd, again, strict=True))


def test_sounds_and_clips_are_changed_as_named() -> None:
    bank, normal, odd, _ = sound_set(DATA, "violin", np.random.default_rng(0))
    assert (len(bank), len(normal), len(odd)) == (4, 4, 20)
    assert all(abs(sound.to_numpy()).max() <= 1 for sound in odd)
    assert raw_distance(odd[1], [normal[0]]) > 0
    bank, normal, odd, _ = clip_set(DATA, "dog", np.random.default_rng(0))
    assert (len(bank), len(normal), len(odd)) == (6, 6, 12)
    still, backwards = odd[0].to_numpy(), odd[4].to_numpy()
    assert (still == still[:1]).all()
    assert raw_distance(odd[4], bank) > raw_distance(normal[0], bank)
    assert backwards.shape == bank[0].to_numpy().shape


def test_concepts_are_evenly_spaced() -> None:
    assert spread(["a", "b", "c", "d"], 2) == ["a", "c"]
    assert spread(["a"], 5) == ["a"]
