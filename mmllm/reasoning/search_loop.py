"""The one search loop: prompt from history -> n completions -> parse -> evaluate -> history.

Strategies differ in the prompt alone:
- opro: the best candidates so far with their values, and a request for a better one
  (Yang et al. 2023, "Large Language Models as Optimizers", arXiv:2309.03409);
- critique: the last candidates, each with what a sound verifier finds wrong with it
  (Kambhampati et al. 2024, "LLM-Modulo", arXiv:2402.01817).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from mmllm.conversation import Message, assistant, user
from mmllm.errors import ConfigError, ContextError, quoted
from mmllm.reasoning.models import Budget, BudgetError, CallError, CallUsage, ChatModel

logger = logging.getLogger(__name__)

C = TypeVar("C")
_STREAK = 3
"""Unusable answers, or failed calls, in a row that are reported."""

Strategy = Literal["opro", "critique"]
_KEEP: dict[str, int] = {"opro": 20, "critique": 4}


@dataclass(frozen=True)
class Evaluation:
    """What is known of a candidate.

    Attributes:
        value: to be minimised.
        is_solved: whether it is a solution, which ends the search.
        critique: what is wrong with it, in words.
    """

    value: float
    is_solved: bool = False
    critique: str = ""


class Problem(Protocol[C]):
    """What is searched for: candidates of type C, and how they are written, read and evaluated."""

    @property
    def name(self) -> str:
        """The problem's name in reports."""
        ...

    @property
    def introduction(self) -> str:
        """What is asked of the model, before the candidates so far."""
        ...

    @property
    def instruction(self) -> str:
        """What asks for a new candidate, and for its format, after the candidates so far."""
        ...

    def start(self, rng: random.Random) -> list[C]:
        """Candidates that are evaluated before the model is asked; may be none."""
        ...

    def parse(self, text: str) -> C:
        """The candidate in a reply. Raises ValueError with what is wrong with the reply."""
        ...

    def show(self, candidate: C) -> str:
        """The candidate as text that `parse` reads; equal candidates give equal texts."""
        ...

    def show_evaluated(self, candidate: C, value: float) -> str:
        """The candidate with its value, as the prompt of strategy opro lists it.

        Args:
            candidate: the candidate.
            value: its value.
        """
        ...

    def evaluate(self, candidate: C) -> Evaluation:
        """Its value, and whether it is a solution; sound: never solved if it is none."""
        ...

    def random(self, rng: random.Random) -> C:
        """Any candidate, for random search."""
        ...

    def neighbor(self, candidate: C, rng: random.Random) -> C:
        """A candidate near another one, for hill climbing.

        Args:
            candidate: the other one.
            rng: source of randomness.
        """
        ...


@dataclass(frozen=True)
class Attempt:
    """One reply of the model, or a start.

    Attributes:
        step: the step, from 1; 0 for starts.
        text: the reply; empty for starts.
        candidate: the candidate as text; None where the reply held none.
        value: its value.
        is_solved: whether it is a solution.
        critique: what is wrong with it, or with the reply.
    """

    step: int
    text: str
    candidate: str | None
    value: float | None = None
    is_solved: bool = False
    critique: str = ""


@dataclass
class SearchResult:
    """What a search found; it is also what `on_step` sees while it goes on.

    Attributes:
        problem: name of the problem.
        strategy: name of the strategy.
        attempts: all starts and replies, in order.
        num_steps: steps that were begun.
        stopped: why it ended: "solved", "steps", "budget" (spent) or "context" (the prompt exceeds
            it); empty while it goes on.
        notes: what the user should know: failed calls, unusable answers.
        usage: what was asked of the model.
    """

    problem: str
    strategy: str
    attempts: list[Attempt] = field(default_factory=list)
    num_steps: int = 0
    stopped: Literal["solved", "steps", "budget", "context", ""] = ""
    notes: list[str] = field(default_factory=list)
    usage: CallUsage = field(default_factory=CallUsage)

    @property
    def evaluated(self) -> list[Attempt]:
        """The attempts that held a candidate."""
        return [attempt for attempt in self.attempts if attempt.value is not None]

    @property
    def best(self) -> Attempt | None:
        """The solution, or else the first of the attempts with the least value."""
        return min(
            self.evaluated, key=lambda attempt: (not attempt.is_solved, attempt.value), default=None
        )

    @property
    def solution(self) -> str | None:
        """The candidate that is a solution; None if there is none."""
        return self.best.candidate if self.best and self.best.is_solved else None

    @property
    def valid_fraction(self) -> float:
        """The fraction of replies that held a candidate."""
        replies = [attempt for attempt in self.attempts if attempt.step]
        return sum(attempt.value is not None for attempt in replies) / max(len(replies), 1)


def search(
    model: ChatModel,
    problem: Problem[Any],
    *,
    strategy: Strategy = "opro",
    steps: int = 20,
    samples: int = 8,
    keep: int | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    on_step: Callable[[SearchResult], object] = lambda _: None,
) -> SearchResult:
    """Search with a language model as the source of candidates.

    A failed call and a reply without a candidate cost their calls and are counted; three in a row
    are noted, with the answer. Stopped and started again with a Recorder, a search takes the same
    turns.

    Args:
        model: asked for candidates. With a Budget the search ends when that is spent.
        problem: what is searched for.
        strategy: how the prompt shows the history.
        steps: calls at most.
        samples: replies per call.
        keep: candidates that the prompt shows: the best 20 for opro, and the last 4 for critique,
            unless given.
        temperature: of the sampling.
        max_new_tokens: of one reply.
        seed: of the starts and of all samples.
        on_step: called after every step.

    Raises:
        ConfigError: an option is out of range or unknown.
    """
    if strategy not in _PROMPTS:
        raise ConfigError(f"strategy: expected opro or critique, got {quoted(strategy)}")
    keep = _KEEP[strategy] if keep is None else keep
    for name, value in (("steps", steps), ("samples", samples), ("keep", keep)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    model = model if isinstance(model, Budget) else Budget(model)
    result = SearchResult(problem.name, strategy)
    for candidate in problem.start(random.Random(seed)):
        _add(result, _evaluated(problem, 0, "", candidate))
    streaks = _Streaks(result)
    while not result.stopped:
        result.num_steps += 1
        try:
            completions = model.complete(
                _PROMPTS[strategy](problem, result, keep),
                n=samples,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed + result.num_steps * samples,
            )
        except CallError as error:
            streaks.failed(error)
            completions = []
        except BudgetError:
            result.num_steps -= 1
            result.stopped = "budget"
            break
        except ContextError as error:  # nothing that was found is lost by it
            result.notes.append(f"step {result.num_steps}: {error}; or lower keep")
            result.stopped = "context"
            break
        for completion in completions:
            attempt = _attempt(problem, result.num_steps, completion.text)
            _add(result, attempt)
            streaks.answered(attempt)
        result.usage = model.usage
        if result.num_steps == steps and not result.stopped:
            result.stopped = "steps"
        on_step(result)
    result.usage = model.usage
    return result


class _Streaks:
    """Notes every third failed call, and every third unusable answer, in a row."""

    def __init__(self, result: SearchResult):
        self._result = result
        self._num_failed = self._num_unusable = 0

    def failed(self, error: CallError) -> None:
        self._num_failed += 1
        if self._num_failed % _STREAK == 0:
            self._note(f"{self._num_failed} calls in a row failed; the last one: {error}")

    def answered(self, attempt: Attempt) -> None:
        self._num_failed = 0
        self._num_unusable = 0 if attempt.value is not None else self._num_unusable + 1
        if self._num_unusable and self._num_unusable % _STREAK == 0:
            self._note(
                f"{self._num_unusable} answers in a row were unusable; the last one: "
                f"{quoted(attempt.text)}: {attempt.critique}"
            )

    def _note(self, note: str) -> None:
        self._result.notes.append(f"step {self._result.num_steps}: {note}")
        logger.warning("%s, step %d: %s", self._result.problem, self._result.num_steps, note)


def _attempt(problem: Problem[Any], step: int, text: str) -> Attempt:
    try:
        candidate = problem.parse(text)
    except ValueError as error:
        return Attempt(step, text, None, critique=str(error))
    return _evaluated(problem, step, text, candidate)


def _evaluated(problem: Problem[C], step: int, text: str, candidate: C) -> Attempt:
    found = problem.evaluate(candidate)
    shown = problem.show(candidate)
    return Attempt(step, text, shown, found.value, found.is_solved, found.critique)


def _add(result: SearchResult, attempt: Attempt) -> None:
    result.attempts.append(attempt)
    if attempt.is_solved:
        result.stopped = "solved"


# --- prompts ------------------------------------------------------------------------------------


def _opro_prompt(problem: Problem[Any], result: SearchResult, keep: int) -> list[Message]:
    """The meta-prompt of OPRO: the best `keep` different candidates, best last."""
    best: dict[str, float] = {}
    for attempt in sorted(result.evaluated, key=lambda attempt: attempt.value or 0.0):
        assert attempt.candidate is not None
        assert attempt.value is not None
        best.setdefault(attempt.candidate, attempt.value)
    lines = [
        problem.show_evaluated(problem.parse(shown), value)
        for shown, value in reversed(list(best.items())[:keep])
    ]
    return [user("\n\n".join([problem.introduction, *lines, problem.instruction]))]


def _critique_prompt(problem: Problem[Any], result: SearchResult, keep: int) -> list[Message]:
    """A conversation: the task, and the last `keep` steps' best replies, each with its critique."""
    messages = [user(f"{problem.introduction}\n\n{problem.instruction}")]
    steps = sorted({attempt.step for attempt in result.attempts if attempt.step})
    for step in steps[-keep:]:
        replies = [attempt for attempt in result.attempts if attempt.step == step]
        chosen = min(replies, key=lambda attempt: _rank(attempt.value))
        messages += [
            assistant(chosen.text),
            user(f"This is wrong: {chosen.critique}\n\n{problem.instruction}"),
        ]
    return messages


def _rank(value: float | None) -> float:
    return float("inf") if value is None else value


_PROMPTS: dict[str, Callable[[Problem[Any], SearchResult, int], list[Message]]] = {
    "opro": _opro_prompt,
    "critique": _critique_prompt,
}
