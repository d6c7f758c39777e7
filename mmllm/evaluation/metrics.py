"""One measured value and its threshold."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Attributes:
        name: of the task ("text->image"), or of the task and what was measured of it
            ("decoder/image, top 1").
        n: number of items, or of tokens for perplexity.
        value: an accuracy from 0 to 1, a ratio or a difference.
        low: lower end of the 95 % interval: Wilson's for an accuracy, the normal
            one for a difference.
        high: its upper end.
        threshold: what the value must reach, as text; empty without one.
        met: whether it does; None without a threshold, or where the threshold is a fraction of a
            metric that was not measured.
        seconds: time that the measurement took.
    """

    name: str
    n: int
    value: float
    low: float | None = None
    high: float | None = None
    threshold: str = ""
    met: bool | None = None
    seconds: float = 0.0


def accuracy_metric(name: str, correct: Sequence[bool], start: float) -> Metric:
    """The fraction of correct items with its interval.

    Args:
        name: the metric's name.
        correct: one entry per item.
        start: `time.perf_counter()` when the measurement began.
    """
    count, n = sum(map(bool, correct)), len(correct)
    low, high = wilson_interval(count, n)
    return Metric(
        name, n, count / max(n, 1), low, high, seconds=round(time.perf_counter() - start, 2)
    )


def mean_metric(name: str, values: Sequence[float], start: float) -> Metric:
    """The mean of values, with its normal 95 % interval.

    Args:
        name: the metric's name.
        values: one per item.
        start: `time.perf_counter()` when the measurement began.

    Example:
        >>> metric = mean_metric("loss", [1.0, 2.0, 3.0, 2.0], 0.0)
        >>> metric.value, round(metric.low, 2), round(metric.high, 2)
        (2.0, 1.2, 2.8)
    """
    n = len(values)
    value = sum(values) / max(n, 1)
    low = high = None
    if n > 1:
        half_width = 1.959964 * statistics.stdev(values) / math.sqrt(n)
        low, high = value - half_width, value + half_width
    return Metric(name, n, value, low, high, seconds=round(time.perf_counter() - start, 2))


def difference_metric(
    name: str, one: Sequence[float], other: Sequence[float], start: float
) -> Metric:
    """The mean difference of paired values, with its normal 95 % interval.

    Args:
        name: the metric's name.
        one: one value per item.
        other: those that are subtracted, of the same items.
        start: `time.perf_counter()` when the measurement began.
    """
    differences = [float(a) - float(b) for a, b in zip(one, other, strict=True)]
    return mean_metric(name, differences, start)


def with_threshold(metric: Metric, threshold: float, note: str = "") -> Metric:
    """Return a copy of a metric that is compared with a threshold.

    It is never met without items, nor is a threshold of 0 (a fraction of a metric that is 0).

    Args:
        metric: the metric.
        threshold: the value that it must reach.
        note: appended to the threshold's text.
    """
    met = metric.n > 0 and threshold > 0 and metric.value >= threshold
    return replace(metric, threshold=f"{threshold:.3f}{note}", met=met)


def with_limit(metric: Metric, limit: float) -> Metric:
    """Return a copy of a metric that is to be no larger than a limit.

    Args:
        metric: the metric.
        limit: the value that it must not exceed.
    """
    return replace(metric, threshold=f"<= {limit:.2f}", met=metric.value <= limit)


def with_gain(metric: Metric, threshold: float = 0.0) -> Metric:
    """Return a copy of a difference that must reach a threshold, with its interval above 0.

    Args:
        metric: the difference.
        threshold: the value that it must reach.
    """
    met = metric.low is not None and metric.low > 0 and metric.value >= threshold
    return replace(metric, threshold=f">= {threshold:.3f}, interval above 0", met=met)


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the confidence interval of a proportion (Wilson 1927).

    Args:
        correct: how many of the items are correct.
        n: the number of items; 0 gives (0, 1).
        z: the quantile of the standard normal distribution; the default gives 95 %.

    Example:
        >>> [round(bound, 3) for bound in wilson_interval(9, 10)]
        [0.596, 0.982]
    """
    if n == 0:
        return 0.0, 1.0
    proportion = correct / n
    centre = (proportion + z * z / (2 * n)) / (1 + z * z / n)
    half_width = (
        z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    )
    return max(centre - half_width, 0.0), min(centre + half_width, 1.0)
