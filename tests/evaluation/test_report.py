"""Intervals, the table, and JSON that comes back as it was."""

from pathlib import Path

import pytest

from mmllm.evaluation.report import Figure, Report, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # scipy.stats.binomtest(right, n).proportion_ci(0.95, method="wilson"), scipy 1.17.1
        (50, 100, 0.403832, 0.596168),
        (9, 10, 0.59585, 0.982124),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (81, 263, 0.255289, 0.366210),
    ],
)
def test_wilson_interval(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def _report() -> Report:
    beside = Report("other", (Figure("text->image", 4, 0.25, 0.05, 0.7),))
    figures = (
        Figure("text->image", 4, 0.5, 0.15, 0.85, "0.600", False, 1.5),
        Figure("batch of 8, media apart", 8, 2e-6, bar="<= 1e-04", met=True),
        Figure("video->text", 4, 1.0, 0.51, 1.0),
    )
    items = ({"id": "a/0", "right": True, "prediction": {"text": "ein Löwe", "named": ["lion"]}},)
    return Report("mini", figures, items, {"versions": {"torch": "2"}}, beside)


def test_json_round_trip(tmp_path: Path) -> None:
    report = _report()
    assert Report.load(report.save(tmp_path / "new" / "report.json")) == report


def test_table_shows_bars_and_the_model_beside() -> None:
    head, _, first, second, third = _report().table().splitlines()
    assert head.split() == ["row", "n", "value", "95", "%", "bar", "met", "other"]
    assert first.split() == ["text->image", "4", "0.500", "0.150-0.850", "0.600", "NO", "0.250"]
    assert second.split()[-4:] == ["2.0e-06", "<=", "1e-04", "yes"]
    assert third.split() == ["video->text", "4", "1.000", "0.510-1.000"]


def test_met_is_false_as_soon_as_one_bar_is_missed() -> None:
    report = _report()
    assert not report.met
    assert Report("mini", report.figures[1:]).met
