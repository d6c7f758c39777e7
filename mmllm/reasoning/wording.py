"""Which wording of a request serves a model best: a bandit over a grammar of wordings.

Every wording is an arm, its reward the score of one item. Successive halving (Jamieson and
Talwalkar 2016, arXiv:1502.07943) evaluates all wordings on a few items and the better half of them
on more, up to a winner. What is found must be measured on items that the search has not seen.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmllm.errors import ConfigError

T = TypeVar("T")

Score = Callable[[Sequence[tuple[str, T]]], Sequence[float]]
"""(wording, item) pairs -> the score of each, larger for better; called once for each round."""


@dataclass(frozen=True)
class WordingSearch(Generic[T]):
    """What a search found.

    Attributes:
        best: the winner.
        means: wording -> its mean score over the items that it was evaluated on.
        counts: wording -> the number of these items.
    """

    best: str
    means: Mapping[str, float]
    counts: Mapping[str, int]

    @property
    def num_evaluations(self) -> int:
        """Scores that the search took."""
        return sum(self.counts.values())


def grammar(template: str, **slots: Sequence[str]) -> list[str]:
    """All wordings of a template, each once, with what is between braces filled in.

    Args:
        template: "{please}{verb} {{caption}}."; doubled braces stay as single ones.
        slots: the possible fillings of each gap.
    """
    names = list(slots)
    filled = (
        template.format(**dict(zip(names, values, strict=True)))
        for values in itertools.product(*slots.values())
    )
    return list(dict.fromkeys(filled))


def best_wording(
    wordings: Sequence[str], items: Sequence[T], score: Score[T], *, budget: int, seed: int = 0
) -> WordingSearch[T]:
    """Search the best of some wordings by successive halving.

    Args:
        wordings: the wordings; each at most once.
        items: what they are tried on; all wordings of a round meet the same ones.
        score: evaluates pairs.
        budget: scores at most, at least one for each wording.
        seed: of the order of the items.

    Raises:
        ConfigError: there are no wordings or items, a wording comes twice, or the budget is too
            small.
    """
    if not wordings or not items:
        raise ConfigError("best_wording: expected at least one wording and one item")
    if len(set(wordings)) < len(wordings):
        raise ConfigError("best_wording: expected wordings that differ")
    if budget < len(wordings):
        raise ConfigError(
            f"budget: expected at least {len(wordings)}, one score for each wording, got {budget}"
        )
    shuffled = random.Random(seed).sample(list(items), len(items))
    scores: dict[str, list[float]] = {wording: [] for wording in wordings}
    remaining = list(wordings)
    num_rounds = max(math.ceil(math.log2(len(wordings))), 1)
    for _ in range(num_rounds):
        first = len(scores[remaining[0]])
        num = max(budget // (num_rounds * len(remaining)), 1)
        pairs = [(wording, item) for wording in remaining for item in shuffled[first : first + num]]
        for (wording, _), value in zip(pairs, score(pairs) if pairs else [], strict=True):
            scores[wording].append(value)
        remaining.sort(key=lambda wording: -_mean(scores[wording]))
        remaining = remaining[: max(math.ceil(len(remaining) / 2), 1)]
    means = {wording: _mean(values) for wording, values in scores.items()}
    counts = {wording: len(values) for wording, values in scores.items()}
    return WordingSearch(remaining[0], means, counts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
