"""What a search found, as text, as JSON and as a curve, always together with random search and hill
climbing at equal evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmllm.reasoning.baselines import BaselineResult, running_best
from mmllm.reasoning.search_loop import SearchResult

HEAD = f"{'step':>5}  {'valid':>7}  {'best of step':>13}  {'best':>13}"
"""Head of the live table, whose lines `step_line` gives."""


def step_line(result: SearchResult) -> str:
    """One line on the last step: valid answers, their least value, and the least value so far."""
    replies = [attempt for attempt in result.attempts if attempt.step == result.num_steps]
    values = [attempt.value for attempt in replies if attempt.value is not None]
    best = result.best.value if result.best else None
    valid = f"{len(values)}/{len(replies)}"
    return f"{result.num_steps:5}  {valid:>7}  {_number(min(values, default=None)):>13}  " + (
        f"{_number(best):>13}"
    )


def summary(result: SearchResult, baselines: Sequence[BaselineResult]) -> str:
    """The result and the baselines as text of several lines.

    Args:
        result: what was found.
        baselines: at as many evaluations.
    """
    found = "nothing"
    if result.best:
        is_solution = "a solution" if result.best.is_solved else "no solution"
        found = f"{result.best.candidate} ({is_solution}, value {_number(result.best.value)})"
    usage = result.usage
    lines = [
        f"{result.problem}, strategy {result.strategy}: {found}",
        f"ended after {result.num_steps} steps ({result.stopped}); {len(result.evaluated)} "
        f"evaluations, {result.valid_fraction:.0%} of the answers valid",
        f"{usage.calls} calls, {usage.failed} of them failed; {usage.prompt_tokens} + "
        f"{usage.completion_tokens} tokens",
    ]
    lines += [
        f"{entry.name} at {entry.num_evaluations} evaluations: solved in {entry.num_solved} of "
        f"{entry.num_runs} runs, median of the best value {_number(entry.median_best)}"
        for entry in baselines
    ]
    return "\n".join([*lines, *result.notes])


def as_json(result: SearchResult, baselines: Sequence[BaselineResult]) -> dict[str, Any]:
    """All that the result holds, as plain data.

    Args:
        result: what was found.
        baselines: at as many evaluations.
    """
    return {
        **asdict(result),
        "best": asdict(result.best) if result.best else None,
        "valid_fraction": result.valid_fraction,
        "baselines": [asdict(entry) for entry in baselines],
    }


def write_curve(result: SearchResult, baselines: Sequence[BaselineResult], path: Path) -> None:
    """Draw the least value so far against evaluations, of the search and of the baselines.

    Args:
        result: what was found.
        baselines: at as many evaluations.
        path: the file; its suffix is the format.

    Raises:
        OSError, ValueError: the file cannot be written, or has a suffix that matplotlib lacks.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = [attempt.value for attempt in result.evaluated if attempt.value is not None]
    axes.step(range(1, len(values) + 1), running_best(values), where="post", label="model")
    for entry in baselines:
        evaluations = range(1, len(entry.curve) + 1)
        label = f"{entry.name} (median of {entry.num_runs})"
        axes.step(evaluations, entry.curve, where="post", linestyle="--", label=label)
    if values and min(values) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("evaluations")
    axes.set_ylabel("least value so far")
    axes.set_title(f"{result.problem}, {result.strategy}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
