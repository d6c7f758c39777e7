"""Thresholds at which a given number of features is active."""

from __future__ import annotations

import pytest
import torch

from mmllm.insight.dictionary import calibration
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.insight.dictionary.calibration import calibrate

STATES = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))


def dictionary(k: int | None = None) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(1)
    made = SparseAutoencoder(6, 40, Origin("m", "s", "s"), k=k)
    made.W_enc.copy_(torch.randn(6, 40, generator=generator))
    made.W_dec.copy_(torch.randn(40, 6, generator=generator))
    made.threshold.copy_(0.5 + torch.rand(40, generator=generator))
    return made


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("chunk", [64, 2048])
def test_k_features_are_active(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CHUNK", chunk)
    made = dictionary()
    calibrated = calibrate(made, STATES, k)
    active = (calibrated.encode(STATES) > 0).sum().item()
    assert k * len(STATES) - 2 <= active <= k * len(STATES)
    ratio = calibrated.threshold / made.threshold
    assert torch.allclose(ratio, ratio[0])
    assert torch.equal(calibrated.W_enc, made.W_enc)


def test_no_more_are_active_than_can_be() -> None:
    """No more than a half of these features is ever positive."""
    calibrated = calibrate(dictionary(), STATES, 39)
    assert not calibrated.threshold.any()
    assert (calibrated.encode(STATES) > 0).sum() == (dictionary().pre_activations(STATES) > 0).sum()
    again = calibrate(calibrated, STATES, 3)
    assert (again.encode(STATES) > 0).sum().item() == pytest.approx(3 * len(STATES), abs=2)


def test_a_number_that_is_fixed_needs_no_thresholds() -> None:
    made = dictionary(k=3)
    assert calibrate(made, STATES, 5) is made
