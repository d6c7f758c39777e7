"""Budgets that are kept, and records from which a run goes on."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from mmllm.conversation import Message, user
from mmllm.errors import ConfigError
from mmllm.reasoning import (
    Budget,
    BudgetError,
    CallError,
    ChatModel,
    Completion,
    Recorder,
    ScriptedModel,
)
from tests.samples import picture


def count_words(text: str, rng: random.Random) -> str:
    return f"{len(text.split())} words, {rng.randrange(1000)}"


class FailingModel(ScriptedModel):
    """Every third call fails."""

    def complete(self, conversation: Sequence[Message], **options) -> list[Completion]:
        completions = super().complete(conversation, **options)
        if len(self.conversations) % 3 == 0:
            raise CallError("the third one fails")
        return completions


def run(model: ChatModel, num: int = 7) -> list[object]:
    """A program of `num` calls, every second one of which is scored, too."""
    found: list[object] = []
    for number in range(num):
        prompt = [user("word " * number)]
        try:
            found.append(model.complete(prompt, n=2, seed=number))
        except CallError as error:
            found.append(str(error))
        if number % 2:
            found.append(model.score(prompt, ["a", "b" * number]))
    return found


def scripted() -> FailingModel:
    return FailingModel(count_words, lambda text, reply: -len(text) - len(reply) / 3)


# --- budgets ------------------------------------------------------------------------------------


def test_the_budget_of_calls_is_kept_and_failures_are_counted() -> None:
    inner = scripted()
    model = Budget(inner, max_calls=5)
    with pytest.raises(BudgetError, match="5 calls"):
        run(model)
    assert model.usage.calls == 5
    assert model.usage.failed == 1
    assert len(inner.conversations) <= 5


@pytest.mark.parametrize("limit", [43, 50, 64, 200, 1000])
def test_the_budget_of_tokens_is_never_exceeded(limit: int) -> None:
    inner = ScriptedModel(lambda text, rng: "one " * rng.randrange(30))
    model = Budget(inner, max_tokens=limit)

    def ask_for_ever() -> None:
        for seed in itertools.count():
            model.complete([user("a b c")], n=2, max_new_tokens=20, seed=seed)

    with pytest.raises(
        BudgetError, match=f"may take 43 tokens, but of the budget of {limit} tokens"
    ):
        ask_for_ever()
    assert 0 < model.usage.tokens <= limit
    assert model.usage.prompt_tokens == 3 * model.usage.calls
    assert limit - model.usage.tokens < 3 + 2 * 20  # no further call was certain to fit


def test_scores_cost_tokens_too() -> None:
    model = Budget(ScriptedModel(count_words, lambda *_: -1.0), max_tokens=10)
    assert model.score([user("a b c")], ["d e", "f"]) == [-1.0, -1.0]
    assert (model.usage.prompt_tokens, model.usage.completion_tokens) == (3, 3)
    with pytest.raises(BudgetError):
        model.score([user("a b c")], ["d e f"])


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_calls: expected at least 1, got 0"):
        Budget(scripted(), max_calls=0)


# --- records ------------------------------------------------------------------------------------


def test_a_run_that_stopped_at_any_call_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    expected = run(Recorder(scripted(), whole))
    num_calls = len(whole.read_bytes().splitlines())
    assert num_calls == 10
    for stop in range(1, num_calls + 1):
        part = tmp_path / f"{stop}.jsonl"
        with suppress(BudgetError):
            run(Budget(Recorder(scripted(), part), max_calls=stop))
        assert len(part.read_bytes().splitlines()) == stop
        inner = scripted()
        inner.conversations = [[]] * sum("complete" in line for line in part.open())
        model = Recorder(inner, part)
        assert run(model) == expected
        assert part.read_bytes() == whole.read_bytes()
        assert model.num_replayed == num_calls


def test_a_finished_record_answers_without_the_model(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    expected = run(Recorder(scripted(), path))
    silent = scripted()
    assert run(Recorder(silent, path)) == expected
    assert silent.conversations == []


def test_a_line_that_was_cut_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    expected = run(Recorder(scripted(), path))
    data = path.read_bytes()
    for cut in (1, 20, len(data.splitlines()[-1])):
        path.write_bytes(data[:-cut])
        inner = scripted()
        inner.conversations = [[]] * 6  # what was asked before, so that the same ones fail
        assert run(Recorder(inner, path)) == expected
        assert path.read_bytes() == data


def test_the_record_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    run(Recorder(scripted(), path))
    with pytest.raises(ConfigError, match=r"call 1 of the record.*n: recorded 2, asked 1"):
        Recorder(scripted(), path).complete([user("")], seed=0)
    other = ScriptedModel(lambda *_: "x")
    with pytest.raises(ConfigError, match="model: recorded 'scripted:count_words'"):
        run(Recorder(other, path))


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"asked": 1}'])
def test_files_that_are_not_records_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match="line 1: expected a recorded call"):
        Recorder(scripted(), path)


def test_media_are_recorded_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    Recorder(scripted(), path).complete([user("what?", picture(40))])
    (entry,) = map(json.loads, path.read_text().splitlines())
    text, medium = entry["asked"]["complete"][0]["parts"]
    assert text == "what?"
    assert len(medium["image"]) == 64
    assert Recorder(scripted(), path).complete([user("what?", picture(40))])
    with pytest.raises(ConfigError, match="another"):
        Recorder(scripted(), path).complete([user("what?", picture(41))])


def test_a_file_that_cannot_be_written_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="folder: cannot be read"):
        Recorder(scripted(), tmp_path / "folder")
