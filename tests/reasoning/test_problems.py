"""Problems against independent truths: brute force, STRIPS operators as sets, Python's numbers."""

from __future__ import annotations

import itertools
import random
import string
from collections import deque
from fractions import Fraction

import pytest

from mmllm.errors import ConfigError
from mmllm.reasoning import ScriptedModel
from mmllm.reasoning.problems import (
    Arithmetic,
    Blocksworld,
    LinearRegression,
    TravellingSalesman,
    calculate,
)
from mmllm.reasoning.problems.blocksworld import TABLE, Action
from mmllm.reasoning.problems.cipher import decode_by_test, decode_directly, encode, matches

PROBLEMS = [LinearRegression(), TravellingSalesman(7), Blocksworld(4), Arithmetic(4)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_candidates_are_read_as_they_are_shown(problem) -> None:
    rng = random.Random(0)
    candidate = problem.random(rng)
    for _ in range(50):
        assert problem.parse(problem.show(candidate)) == candidate
        assert problem.parse(f"I think\n{problem.show(candidate)}\n") == candidate
        shown = problem.show_evaluated(candidate, problem.evaluate(candidate).value)
        assert problem.parse(shown if problem is not PROBLEMS[0] else problem.show(candidate))
        candidate = problem.neighbor(candidate, rng)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_an_answer_without_a_candidate_is_refused_with_the_reason(problem) -> None:
    for text in ("", "no", "[", "[PLAN] [END]", "<trace> </trace>", "[1 +]", "[a, b]", "[1,2,3]"):
        with pytest.raises(ValueError, match=r"\w+"):
            problem.parse(text)


# --- linear regression --------------------------------------------------------------------------


def test_the_loss_is_smallest_near_the_truth() -> None:
    problem = LinearRegression(15, 14, seed=1)
    values = {
        pair: problem.evaluate(pair).value for pair in itertools.product(range(10, 21), repeat=2)
    }
    w, b = min(values, key=lambda pair: values[pair])
    assert abs(w - 15) <= 0
    assert abs(b - 14) <= 1
    assert [pair for pair in values if problem.evaluate(pair).is_solved] == [(15, 14)]


def test_the_last_pair_counts() -> None:
    problem = LinearRegression()
    assert problem.parse("from [1, 2] to [ -3.6 , +4 ].") == (-4, 4)
    assert problem.parse("w = 3, b = 5") == (3, 5)


# --- travelling salesman ------------------------------------------------------------------------


@pytest.mark.parametrize("num", [3, 4, 6, 8])
def test_the_optimum_is_that_of_brute_force(num: int) -> None:
    problem = TravellingSalesman(num, seed=num)
    tours = [(0, *rest) for rest in itertools.permutations(range(1, num))]
    lengths = [problem.length(tour) for tour in tours]
    assert problem.optimum == pytest.approx(min(lengths))
    solved = [tour for tour in tours if problem.evaluate(tour).is_solved]
    assert solved == [
        tour for tour, length in zip(tours, lengths, strict=True) if length < min(lengths) + 1e-6
    ]


def test_a_trace_has_every_point_once() -> None:
    problem = TravellingSalesman(4)
    assert problem.parse("<trace> 2, 3,0,1 </trace>") == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"misses the points \[3\]"):
        problem.parse("<trace>0,1,2</trace>")
    with pytest.raises(ValueError, match="twice, or such as do not exist"):
        problem.parse("<trace>0,1,2,3,2</trace>")
    assert TravellingSalesman(13).optimum is None
    with pytest.raises(ConfigError, match="at least 3 nodes, got 2"):
        TravellingSalesman(2)


# --- blocksworld --------------------------------------------------------------------------------

Facts = frozenset[tuple[str, ...]]


def facts(state: dict[str, str]) -> Facts:
    """A state as the standard domain's predicates, the hand empty."""
    on = {("on", block, below) for block, below in state.items() if below != TABLE}
    clear = {("clear", block) for block in state if block not in state.values()}
    table = {("ontable", block) for block, below in state.items() if below == TABLE}
    return frozenset({*on, *clear, *table, ("handempty",)})


def strips(action: Action) -> tuple[Facts, Facts, Facts]:
    """Preconditions, added and deleted facts of the standard 4-operator domain."""
    x, y = action.block, action.other
    pick = {("clear", x), ("ontable", x), ("handempty",)}
    put = {("clear", x), ("ontable", x), ("handempty",)}
    on = {("on", x, y), ("clear", x), ("handempty",)}
    table: dict[str, tuple[set, set, set]] = {
        "pick-up": (pick, {("holding", x)}, pick),
        "put-down": ({("holding", x)}, put, {("holding", x)}),
        "stack": ({("holding", x), ("clear", y)}, on, {("holding", x), ("clear", y)}),
        "unstack": (on, {("holding", x), ("clear", y)}, on),
    }
    needed, added, deleted = table[action.name]
    return frozenset(needed), frozenset(added), frozenset(deleted)


def is_valid(problem: Blocksworld, plan: tuple[Action, ...]) -> bool:
    """The verdict by STRIPS."""
    state = facts(dict(problem.initial))
    for action in plan:
        needed, added, deleted = strips(action)
        if not needed <= state:
            return False
        state = state - deleted | added
    goal = {fact for fact in facts(dict(problem.goal)) if fact[0] in ("on", "ontable")}
    return goal <= state


def all_actions(num: int) -> list[Action]:
    names = "ABCDEFGHIJ"[:num]
    pairs = [(x, y) for x in names for y in names]  # x on itself, too: no plan may do it
    return [
        *(Action(name, x) for name in ("pick-up", "put-down") for x in names),
        *(Action(name, x, y) for name in ("stack", "unstack") for x, y in pairs),
    ]


@pytest.mark.parametrize("num", [3, 4, 5])
def test_the_verifier_agrees_with_strips_on_every_kind_of_plan(num: int) -> None:
    rng = random.Random(num)
    verdicts = []
    for seed in range(40):
        problem = Blocksworld(num, seed=seed)
        plans = [problem.random(rng) for _ in range(20)]
        plans += [problem.neighbor(plan, rng) for plan in plans]
        plans += [(*plan, rng.choice(all_actions(num))) for plan in plans]
        plans += [tuple(rng.sample(plan, len(plan))) for plan in plans]
        for plan in plans:
            found = problem.evaluate(plan)
            assert found.is_solved == is_valid(problem, plan), problem.show(plan)
            assert (found.value == 0) == found.is_solved
            verdicts.append(found.is_solved)
    assert 5 < sum(verdicts) < len(verdicts) - 5


def test_every_short_sequence_of_actions_gets_the_verdict_of_strips() -> None:
    problem = Blocksworld(3, seed=2)
    for length in (1, 2, 3):
        for plan in itertools.product(all_actions(3), repeat=length):
            assert problem.evaluate(plan).is_solved == is_valid(problem, plan)


@pytest.mark.parametrize("seed", range(5))
def test_every_instance_can_be_solved(seed: int) -> None:
    problem = Blocksworld(4, seed=seed)
    start = facts(dict(problem.initial))
    queue: deque[tuple[Facts, tuple[Action, ...]]] = deque([(start, ())])
    seen = {start}
    while queue:
        state, plan = queue.popleft()
        if is_valid(problem, plan):
            break
        for action in all_actions(4):
            needed, added, deleted = strips(action)
            after = state - deleted | added
            if needed <= state and after not in seen:
                seen.add(after)
                queue.append((after, (*plan, action)))
    else:
        pytest.fail("no plan reaches the goal")
    assert plan
    assert problem.evaluate(problem.parse(problem.show(plan))).is_solved


@pytest.mark.parametrize(
    ("line", "action"),
    [
        ("pick up block A", Action("pick-up", "A")),
        ("1. Pick-up the block b.", Action("pick-up", "B")),
        ("put down A", Action("put-down", "A")),
        ("stack A on top of B", Action("stack", "A", "B")),
        ("Stack block A onto block B", Action("stack", "A", "B")),
        ("unstack the block A from on top of the block B", Action("unstack", "A", "B")),
        ("unstack A B", Action("unstack", "A", "B")),
    ],
)
def test_actions_are_read_in_many_spellings(line: str, action: Action) -> None:
    assert Blocksworld(3).parse(f"[PLAN]\n{line}\n[END] and pick up C") == (action,)


def test_the_critique_names_the_action_and_the_reason() -> None:
    problem = Blocksworld(3, seed=0)
    top = next(block for block in problem.initial if block not in problem.initial.values())
    plan = (Action("put-down", top),)
    found = problem.evaluate(plan)
    assert (
        f"action 1, `put-down {top}`, cannot be executed: the hand does not hold" in found.critique
    )
    assert "there is no block J" in problem.evaluate((Action("pick-up", "J"),)).critique
    assert "at the end of the plan" in problem.evaluate(()).critique


# --- arithmetic ---------------------------------------------------------------------------------


def test_the_calculator_agrees_with_python() -> None:
    rng = random.Random(0)
    problem = Arithmetic(6)
    for _ in range(200):
        expression = problem.random(rng)
        exact = " ".join(
            f"Fraction({token})" if token.isdigit() else token for token in expression.split()
        )
        try:
            expected = eval(exact, {"Fraction": Fraction})
        except ZeroDivisionError:
            with pytest.raises(ValueError, match="divides by 0"):
                calculate(expression)
        else:
            assert calculate(expression).value == expected


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("-2 - -3", 1),
        ("2 \u00d7 3 \u00f7 4", Fraction(3, 2)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("2--3*-2", -4),
    ],
)
def test_signs_and_decimals_are_exact(expression: str, value: Fraction) -> None:
    assert calculate(expression).value == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1 +", "(1", "1)", "1 2", "1 / 0", "2 ** 9", "a", "__import__('os')", "1" * 13),
        *("(" * 119, "9" * 121, "1e9", "().x", "*"),
    ],
)
def test_nothing_but_arithmetic_is_computed(expression: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        calculate(expression)


def test_each_number_is_used_once() -> None:
    problem = Arithmetic(3, seed=4)
    one, two, three = problem.numbers
    assert problem.parse(f"so [{one} + ({two}*{three})]") == f"{one} + ( {two} * {three} )"
    with pytest.raises(ValueError, match="does not use each of"):
        problem.parse(f"[{one} + {two}]")
    with pytest.raises(ValueError, match="does not use each of"):
        problem.parse(f"[{problem.target}]")


# --- ciphers ------------------------------------------------------------------------------------

ENGLISH = "The queen was not amused."


def likelihood(_: str, reply: str) -> float:
    """Counts the letters that are frequent in English."""
    return sum(letter in "etaoin shr" for letter in reply.lower())


@pytest.mark.parametrize("shift", range(26))
def test_every_shift_is_decoded_by_test(shift: int) -> None:
    table = {
        letter: string.ascii_lowercase[(index + shift) % 26]
        for index, letter in enumerate(string.ascii_lowercase)
    }
    expected = "".join(table.get(letter, letter) for letter in ENGLISH.lower())
    ciphertext = encode(ENGLISH, shift)
    assert ciphertext.lower() == expected
    found = decode_by_test(ScriptedModel(lambda *_: "", likelihood), ciphertext)
    assert (found.text, found.shift) == (ENGLISH, shift)
    assert len(found.scores) == 26


def test_asked_directly_the_shift_and_an_example_are_named() -> None:
    model = ScriptedModel(lambda *_: ' "the Queen was not amused" ')
    decoded = decode_directly(model, encode(ENGLISH, 3), 3)
    assert matches(decoded, ENGLISH)
    assert not matches(decoded, "The king was not amused")
    (question,) = model.conversations[0]
    assert '"Stay here!" becomes "Vwdb khuh!"' in question.text
    assert question.text.endswith(encode(ENGLISH, 3))
