"""The bandit over wordings: it finds the best of known ones, within its budget."""

from __future__ import annotations

import random

import pytest

from mmllm.errors import ConfigError
from mmllm.reasoning.wording import best_wording, grammar

WORDINGS = [f"wording {number}" for number in range(16)]


def noisy(pairs):
    """Wording 11 succeeds in 0.8 of the items, the others in 0.4."""
    return [
        float(random.Random(f"{wording} {item}").random() < (0.8 if "11" in wording else 0.4))
        for wording, item in pairs
    ]


def test_a_grammar_gives_every_wording_once() -> None:
    found = grammar("{polite}{verb} {{caption}}.", polite=["", "Please "], verb=["draw", "paint"])
    assert found == [
        "draw {caption}.",
        "paint {caption}.",
        "Please draw {caption}.",
        "Please paint {caption}.",
    ]
    assert grammar("{a}{b}", a=["", "x"], b=["x", ""]) == ["x", "", "xx"]


@pytest.mark.parametrize("seed", range(5))
def test_the_best_wording_wins_within_the_budget(seed: int) -> None:
    found = best_wording(WORDINGS, range(200), noisy, budget=800, seed=seed)
    assert found.best == "wording 11"
    assert found.num_evaluations <= 800
    assert found.counts["wording 11"] == max(found.counts.values()) == 12 + 25 + 50 + 100


def test_all_wordings_of_a_round_meet_the_same_items() -> None:
    rounds = []

    def score(pairs):
        rounds.append(pairs)
        return [0.0] * len(pairs)

    best_wording(WORDINGS[:4], range(50), score, budget=40)
    for pairs in rounds:
        items = {wording: [i for w, i in pairs if w == wording] for wording, _ in pairs}
        assert len({tuple(entry) for entry in items.values()}) == 1
    assert [len(pairs) for pairs in rounds] == [20, 20]


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget: expected at least 16"):
        best_wording(WORDINGS, range(9), noisy, budget=15)
    with pytest.raises(ConfigError, match="at least one wording"):
        best_wording([], range(9), noisy, budget=15)
    with pytest.raises(ConfigError, match="wordings that differ"):
        best_wording(["a", "a"], range(9), noisy, budget=15)
