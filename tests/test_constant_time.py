"""demos/constant_time.py: its test of an order, its three ways, and its files."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from demos import constant_time
from mmllm.reasoning.scripted import ScriptedModel


def scripted(share: float) -> ScriptedModel:
    """A model that writes the right order in `share` of its replies, else the one it was given."""

    def rule(prompt: str, rng: random.Random) -> str:
        numbers = [int(found) for found in re.findall(r"\d+", prompt.splitlines()[3])]
        return " " + ", ".join(map(str, sorted(numbers) if rng.random() < share else numbers))

    return ScriptedModel(rule)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ([1, 2, 2, 9], True),
        ([1, 2, 9, 2], False),  # not in order
        ([1, 2, 9], False),  # one is missing
        ([1, 2, 2, 2, 9], False),  # one is there too often
        ([1, 2, 3, 9], False),  # another number
        ([], False),
    ],
)
def test_the_test_of_an_order_is_sound(answer: list[int], right: bool) -> None:
    assert constant_time.is_ordered([2, 9, 1, 2], answer) is right


def test_only_the_first_line_of_a_reply_is_its_answer() -> None:
    assert constant_time.numbers_in("Order: 3, 14, 15\n92") == [3, 14, 15]
    assert constant_time.numbers_in("\n") == []


def test_a_model_that_is_seldom_right_gains_by_the_test() -> None:
    model, numbers = scripted(0.3), [5, 4, 3, 2, 1]
    asked = [constant_time.ask(scripted(0.0), numbers, seed)[0] for seed in range(20)]
    tested = [constant_time.generate_and_test(model, numbers, seed)[0] for seed in range(20)]
    assert not any(asked)
    assert all(tested[seed] for seed in (0, 1))
    assert sum(tested) >= 17


def test_the_program_is_right_and_tests_more_orders_of_more_numbers() -> None:
    tests = []
    for size in (2, 5, 10):
        outcomes = [constant_time.search(scripted(0), list(range(size, 0, -1)), s) for s in (0, 1)]
        assert all(right for right, _ in outcomes)
        tests.append(sum(num for _, num in outcomes))
    assert tests[0] < tests[1] < tests[2]


def test_measures_and_draws(tmp_path: Path) -> None:
    results = constant_time.measure(scripted(0.5), (2, 3), num=4)
    assert json.loads(json.dumps(results)) == results
    assert [row["accuracy"] for row in results["program with the same test"]] == [1, 1]
    constant_time.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
