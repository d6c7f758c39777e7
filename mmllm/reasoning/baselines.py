"""Random search and hill climbing at the evaluations that a search by a language model took."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmllm.reasoning.search_loop import Problem, SearchResult

REPEATS = 20
"""Runs of each baseline."""


@dataclass(frozen=True)
class BaselineResult:
    """Several runs of one baseline.

    Attributes:
        name: "random search" or "hill climbing".
        num_evaluations: of each run, at most; one that is solved ends.
        num_runs: number of runs.
        num_solved: runs that found a solution.
        median_best: median over the runs of the least value.
        curve: by evaluation, the median over the runs of the least value so far.
    """

    name: str
    num_evaluations: int
    num_runs: int
    num_solved: int
    median_best: float
    curve: tuple[float, ...]


def baselines(
    problem: Problem[Any], result: SearchResult, *, repeats: int = REPEATS, seed: int = 0
) -> list[BaselineResult]:
    """Run both baselines, with as many evaluations as a search took, its starts included.

    Args:
        problem: what was searched for.
        result: what was found by a language model.
        repeats: runs of each baseline.
        seed: of these runs.
    """
    num = max(len(result.evaluated), 1)
    return [
        _run("random search", random_search, problem, num, repeats, seed),
        _run("hill climbing", hill_climbing, problem, num, repeats, seed),
    ]


def random_search(problem: Problem[Any], num: int, rng: random.Random) -> tuple[list[float], bool]:
    """Evaluate the starts, then candidates drawn at random.

    Args:
        problem: what is searched for.
        num: evaluations at most.
        rng: source of randomness.

    Returns:
        The values in order, and whether the last one is of a solution.
    """
    values: list[float] = []
    starts = problem.start(rng)
    while len(values) < num:
        candidate = starts.pop(0) if starts else problem.random(rng)
        found = problem.evaluate(candidate)
        values.append(found.value)
        if found.is_solved:
            return values, True
    return values, False


def hill_climbing(problem: Problem[Any], num: int, rng: random.Random) -> tuple[list[float], bool]:
    """Evaluate the starts, then neighbors of the best candidate so far.

    Args:
        problem: what is searched for.
        num: evaluations at most.
        rng: source of randomness.

    Returns:
        The values in order, and whether the last one is of a solution.
    """
    values: list[float] = []
    starts = problem.start(rng) or [problem.random(rng)]
    best, best_value = starts[0], float("inf")
    while len(values) < num:
        candidate = starts.pop(0) if starts else problem.neighbor(best, rng)
        found = problem.evaluate(candidate)
        values.append(found.value)
        if found.is_solved:
            return values, True
        if found.value <= best_value:
            best, best_value = candidate, found.value
    return values, False


def _run(
    name: str,
    method: Callable[[Problem[Any], int, random.Random], tuple[list[float], bool]],
    problem: Problem[Any],
    num: int,
    repeats: int,
    seed: int,
) -> BaselineResult:
    runs = [method(problem, num, random.Random(seed * repeats + run)) for run in range(repeats)]
    curves = []
    for values, _ in runs:
        curve = running_best(values)
        curves.append(curve + [curve[-1]] * (num - len(curve)))
    medians = tuple(statistics.median(column) for column in zip(*curves, strict=True))
    return BaselineResult(
        name, num, repeats, sum(solved for _, solved in runs), medians[-1], medians
    )


def running_best(values: list[float]) -> list[float]:
    """The least value so far, by evaluation."""
    best = float("inf")
    return [best := min(best, value) for value in values]
