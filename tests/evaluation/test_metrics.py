"""Thresholds and confidence intervals."""

import pytest

from mmllm.evaluation.metrics import (
    Metric,
    difference_metric,
    wilson_interval,
    with_gain,
    with_threshold,
)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # scipy.stats.binomtest(right, n).proportion_ci(0.95, method="wilson"), scipy 1.17.1
        (50, 100, 0.403832, 0.596168),
        (9, 10, 0.59585, 0.982124),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (81, 263, 0.255289, 0.366210),
    ],
)
def test_wilson_interval(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "threshold", "met"), [(0.6, 0.6, True), (0.59, 0.6, False), (0.0, 0.0, False)]
)
def test_a_threshold_that_is_a_fraction_of_nothing_is_not_met(
    value: float, threshold: float, met: bool
) -> None:
    assert with_threshold(Metric("r", 10, value), threshold).met is met


def test_a_difference_is_that_of_pairs() -> None:
    one, other = [True, True, False, True] * 25, [False, True, False, True] * 25
    metric = difference_metric("gain", one, other, 0.0)
    assert (metric.n, metric.value) == (100, 0.25)
    assert metric.low == pytest.approx(0.25 - 1.96 * 0.4352 / 10, abs=1e-3)
    assert metric.high == pytest.approx(0.25 + 1.96 * 0.4352 / 10, abs=1e-3)
    assert with_gain(metric, 0.2).met
    assert not with_gain(metric, 0.3).met
    alone = difference_metric("gain", [True], [False], 0.0)
    assert alone.low is None
    assert not with_gain(alone).met
