"""The search loop: scripted optimizers reach the optimum, runs resume, failures cost calls."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mmllm.conversation import Message
from mmllm.errors import ConfigError, ContextError
from mmllm.reasoning import Budget, BudgetError, CallError, Completion, Recorder, ScriptedModel
from mmllm.reasoning.baselines import baselines, hill_climbing, random_search, running_best
from mmllm.reasoning.problems import Arithmetic, Blocksworld, LinearRegression, TravellingSalesman
from mmllm.reasoning.search_loop import SearchResult, search
from tests.reasoning.optimizers import descend, shorten


@pytest.mark.parametrize("seed", range(5))
def test_the_scripted_optimizer_finds_15_14_within_8_steps(seed: int) -> None:
    result = search(
        ScriptedModel(descend), LinearRegression(15, 14, seed=seed), steps=8, seed=1000 * seed
    )
    assert result.solution == "[15, 14]"
    assert result.stopped == "solved"
    assert result.valid_fraction == 1
    assert result.usage.calls == result.num_steps <= 8


@pytest.mark.parametrize("seed", range(5))
def test_the_scripted_optimizer_finds_the_shortest_tour_of_10_nodes(seed: int) -> None:
    problem = TravellingSalesman(10, seed=seed)
    result = search(ScriptedModel(shorten), problem, steps=40, seed=seed)
    assert result.stopped == "solved"
    assert result.best is not None
    assert result.best.value == pytest.approx(problem.optimum)


def test_the_prompt_is_the_papers_with_the_best_last() -> None:
    model = ScriptedModel(lambda *_: "[0, 0]")
    search(model, LinearRegression(3, 5), steps=2, samples=1, keep=3, seed=4)
    lines = model.conversations[1][0].text.splitlines()
    assert lines[0].startswith("Now you will help me minimize a function")
    assert lines[-1].endswith("[w, b], where w and b are numerical values.")
    values = [int(line) for line in lines if line.isdigit()]
    assert values == sorted(values, reverse=True)
    assert len(values) == 3
    assert lines.count("value:") == 3


def test_a_candidate_is_listed_once() -> None:
    model = ScriptedModel(lambda *_: "[12, 12]")
    search(model, LinearRegression(3, 5), steps=3)
    assert model.conversations[-1][0].text.count("w=12, b=12") == 1


# --- stop and resume ----------------------------------------------------------------------------


def test_a_search_that_stopped_at_any_call_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    problem = TravellingSalesman(9, seed=3)
    options: dict[str, Any] = {"steps": 6, "samples": 3, "seed": 2}
    whole = tmp_path / "whole.jsonl"
    expected = search(Recorder(ScriptedModel(shorten), whole), problem, **options)
    num = expected.usage.calls
    assert num >= 3
    for stop in range(1, num):
        part = tmp_path / f"{stop}.jsonl"
        stopped = search(
            Budget(Recorder(ScriptedModel(shorten), part), max_calls=stop), problem, **options
        )
        assert stopped.stopped == "budget"
        assert stopped.attempts == expected.attempts[: 5 + 3 * stop]
        result = search(Recorder(ScriptedModel(shorten), part), problem, **options)
        assert json.dumps(asdict(result)) == json.dumps(asdict(expected))
        assert part.read_bytes() == whole.read_bytes()


# --- what goes wrong ----------------------------------------------------------------------------


def test_three_unusable_answers_in_a_row_are_noted_with_the_answer() -> None:
    answers = iter(["[1, 2]", "a", "b", "[3, 4]", "c", "d", "what a pair!", "[5, 6]"])
    model = ScriptedModel(lambda *_: next(answers))
    result = search(model, LinearRegression(), steps=1, samples=8)
    assert len(result.notes) == 1
    assert "step 1: 3 answers in a row were unusable" in result.notes[0]
    assert "'what a pair!': there is no pair [w, b] in it" in result.notes[0]
    assert result.valid_fraction == 3 / 8
    assert len(result.evaluated) == 5 + 3


class FlakyModel(ScriptedModel):
    """Fails in the first `num_failures` calls."""

    num_failures = 4

    def complete(self, conversation: Sequence[Message], **options: Any) -> list[Completion]:
        completions = super().complete(conversation, **options)
        if len(self.conversations) <= self.num_failures:
            raise CallError("HTTP status 500")
        return completions


def test_failed_calls_cost_their_steps_and_the_search_goes_on() -> None:
    result = search(FlakyModel(descend), LinearRegression(), steps=6, samples=2)
    assert result.usage.calls == 6
    assert result.usage.failed == 4
    assert [note.partition(";")[0] for note in result.notes] == ["step 3: 3 calls in a row failed"]
    assert "HTTP status 500" in result.notes[0]
    assert {attempt.step for attempt in result.attempts} == {0, 5, 6}


def test_a_spent_budget_ends_the_search_with_what_was_found() -> None:
    model = Budget(ScriptedModel(descend), max_calls=2)
    result = search(model, LinearRegression(36, -1), steps=50)
    assert result.stopped == "budget"
    assert result.num_steps == result.usage.calls == 2
    assert len(result.attempts) == 5 + 16
    with suppress(BudgetError):
        model.complete(model.model.conversations[0])  # pyright: ignore
    assert model.usage.calls == 2


def test_a_prompt_that_exceeds_the_context_ends_the_search_with_what_was_found() -> None:
    class Short(ScriptedModel):
        def complete(self, conversation: Sequence[Message], **options: Any) -> list[Completion]:
            if len(self.conversations) == 2:
                raise ContextError("the prompt takes 99 tokens")
            return super().complete(conversation, **options)

    result = search(Short(descend), LinearRegression(36, -1), steps=9)
    assert result.stopped == "context"
    assert len(result.attempts) == 5 + 16
    assert result.notes == ["step 3: the prompt takes 99 tokens; or lower keep"]


@pytest.mark.parametrize("option", [{"steps": 0}, {"samples": 0}, {"keep": 0}])
def test_options_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least 1, got 0"):
        search(ScriptedModel(descend), LinearRegression(), **option)  # pyright: ignore
    with pytest.raises(ConfigError, match="expected opro or critique, got 'x'"):
        search(ScriptedModel(descend), LinearRegression(), strategy="x")  # pyright: ignore


# --- critique by a verifier ---------------------------------------------------------------------


def test_the_verifiers_critique_is_sent_back() -> None:
    """A planner that repairs the action that the critique names solves the instance."""
    problem = Blocksworld(3, seed=1)
    rng = random.Random(0)
    plan = next(
        plan for plan in iter(lambda: problem.random(rng), None) if problem.evaluate(plan).is_solved
    )
    wrong = problem.show((plan[-1], *plan[1:]))

    def repair(text: str, rng: random.Random) -> str:
        return problem.show(plan) if "action 1" in text else wrong

    model = ScriptedModel(repair)
    result = search(model, problem, strategy="critique", samples=1, steps=5)
    assert result.solution == problem.show(plan)
    assert result.num_steps == 2
    task, answer, critique = model.conversations[1]
    assert "My goal is to have that block A" in task.text
    assert answer.text == wrong
    assert critique.text.startswith("This is wrong: action 1, `")


def test_only_the_last_critiques_are_kept() -> None:
    model = ScriptedModel(lambda *_: "no plan")
    search(model, Blocksworld(3), strategy="critique", samples=2, steps=5, keep=2)
    assert [len(conversation) for conversation in model.conversations] == [1, 3, 5, 5, 5]


# --- baselines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [LinearRegression(), TravellingSalesman(6), Blocksworld(3), Arithmetic(3)],
    ids=lambda problem: problem.name,
)
def test_baselines_take_as_many_evaluations_as_the_search(problem: Any) -> None:
    result = search(ScriptedModel(lambda *_: "nothing"), problem, steps=2)
    result.attempts += result.attempts[:1] * 30
    num = max(len(result.evaluated), 1)
    calls = 0
    evaluate = problem.evaluate

    def counted(candidate: Any) -> Any:
        nonlocal calls
        calls += 1
        return evaluate(candidate)

    problem.evaluate = counted
    for method in (random_search, hill_climbing):
        calls = 0
        values, is_solved = method(problem, num, random.Random(0))
        assert len(values) == calls <= num
        assert is_solved or calls == num
    for found in baselines(problem, result, repeats=3):
        assert found.num_evaluations == num
        assert len(found.curve) == num
        assert list(found.curve) == sorted(found.curve, reverse=True)
        assert found.median_best == found.curve[-1]


def test_hill_climbing_is_better_than_chance() -> None:
    problem = LinearRegression(30, 2)
    result = SearchResult("x", "opro")
    result.attempts = search(ScriptedModel(descend), problem, steps=1).attempts[:1] * 150
    random_baseline, climbing = baselines(problem, result)
    assert climbing.median_best < random_baseline.median_best / 4


def test_the_running_best() -> None:
    assert running_best([3, 4, 2, 5]) == [3, 3, 2, 2]
