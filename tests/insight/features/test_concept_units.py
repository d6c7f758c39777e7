"""Areas under the ROC curve against sklearn, and the choice of units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mmllm.insight.features.concept_units import Exemplar, auroc, bootstrap_mean, concept_units


def test_areas_equal_those_of_sklearn_with_ties() -> None:
    rng = np.random.default_rng(0)
    values = torch.tensor(rng.integers(0, 4, size=(40, 6)).astype(np.float32))
    labels = rng.integers(0, 3, size=40)
    areas = auroc(values, labels.tolist(), 4)
    for label in range(3):
        for unit in range(6):
            expected = roc_auc_score(labels == label, values[:, unit])
            assert areas[label, unit].item() == pytest.approx(expected, abs=1e-6)
    assert areas[3].isnan().all()


def test_the_unit_that_serves_every_modality_is_chosen() -> None:
    """Unit 0 knows the pictures of "dog" alone, unit 1 its pictures and sounds, unit 2 nothing."""
    exemplars, values = [], []
    for held_out in (False, True):
        for modality in ("image", "audio"):
            for concept in ("dog", "cat"):
                for number in range(3):
                    exemplars.append(Exemplar(concept, modality, held_out))
                    dog = concept == "dog"
                    values.append([9.0 * (dog and modality == "image"), 1.0 * dog + number / 9, 0])
    exemplars.append(Exemplar("seen only", "image", False))
    values.append([0, 0, 0])
    chosen = {
        each.concept: each
        for each in concept_units(torch.tensor(values), exemplars, ["image", "audio"])
    }
    assert set(chosen) == {"dog", "cat"}
    assert chosen["dog"].unit == 1
    assert chosen["dog"].auroc == {"image": 1, "audio": 1}
    assert chosen["dog"].worst == 1


def test_the_interval_holds_the_mean() -> None:
    mean, low, high = bootstrap_mean([0.0, 1.0] * 50)
    assert mean == 0.5
    assert 0.38 < low < 0.45 < 0.55 < high < 0.62
