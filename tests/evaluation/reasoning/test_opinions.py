"""Opinionated questions, of which those that measure were not trained; the demo that uses both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from demos.focus import measure, write_stage
from mmllm.config import load_run
from mmllm.conversation import Message, assistant
from mmllm.data.sources import read_rows
from mmllm.evaluation.reasoning.opinions import (
    TEST_OPINIONS,
    TRAIN_OPINIONS,
    measured_questions,
    training_pairs,
)
from mmllm.inference.replies import Reply
from mmllm.reasoning import Completion
from mmllm.reasoning.system2_attention import rewriting_prompt

PAIRS = list(training_pairs(500))
QUESTIONS = measured_questions(200)


def test_a_pair_is_the_papers_prompt_and_what_stays_of_the_message() -> None:
    unopinionated = 0
    head = rewriting_prompt("", separate=False)
    for prompt, kept in PAIRS:
        assert prompt.startswith(head)
        message = prompt.removeprefix(head)
        unopinionated += message == kept
        for sentence in re.findall(r"[^.?]+[.?]", kept):
            assert sentence.strip() in message
    assert 0.1 < unopinionated / len(PAIRS) < 0.25
    assert sum("." in kept for _, kept in PAIRS) > 50  # a context that must stay
    assert list(training_pairs(500)) == PAIRS
    assert list(training_pairs(500, seed=1)) != PAIRS


def test_two_hundred_questions_are_asked_with_a_wrong_opinion() -> None:
    assert len({entry.question for entry in QUESTIONS}) == len(QUESTIONS) == 200
    for entry in QUESTIONS:
        assert entry.question in entry.opinion
        assert entry.wrong in entry.opinion
        assert entry.answer != entry.wrong
    assert measured_questions(200) == QUESTIONS
    numbers = [entry for entry in QUESTIONS if "plus" in entry.question]
    assert numbers
    for entry in numbers:
        one, other = map(int, re.findall(r"\d", entry.question))
        assert int(entry.answer) == one + other != int(entry.wrong)


def test_what_measures_was_not_trained() -> None:
    assert not set(TRAIN_OPINIONS) & set(TEST_OPINIONS)
    trained = {" ".join(kept.split()[:4]) for _, kept in PAIRS}
    assert not {" ".join(entry.question.split()[:4]) for entry in QUESTIONS} & trained


def test_the_stage_of_the_demo_trains_on_its_pairs(tmp_path: Path) -> None:
    run = load_run(write_stage(tmp_path, steps=3))
    assert run.stage.steps * run.stage.batch_size == 48
    assert not run.system.encoders
    rows, _ = read_rows(str(tmp_path / "pairs.jsonl"), None, "pairs")
    prompts = [prompt for prompt, _ in training_pairs(48)]
    assert [rows[number]["messages"][0]["content"] for number in range(len(rows))] == prompts


class Answering:
    """A chat that answers rightly unless it reads an opinion; as a rewriter it drops opinions."""

    def __init__(self, drops: bool):
        self.drops = drops
        self.prompts: list[str] = []

    def complete(self, conversation: Sequence[Message], **_: Any) -> list[Completion]:
        text = conversation[-1].text
        asked = [entry.question for entry in QUESTIONS if entry.question in text]
        return [Completion(asked[0] if self.drops else text.rpartition("Text by User: ")[2])]

    def reply_many(self, conversations: Sequence[Sequence[Message]], **_: Any) -> list[Reply]:
        replies = []
        for conversation in conversations:
            text = conversation[-1].text
            self.prompts.append(text)
            (entry,) = [entry for entry in QUESTIONS if entry.question in text]
            is_led = entry.wrong in text.replace(entry.question, "")
            name = entry.wrong if is_led else entry.answer
            replies.append(Reply(assistant(f"It is {name}."), 0, []))
        return replies


def test_the_demo_counts_every_way_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    llm: Any = Answering(drops=False)
    measure(llm, rewriter=cast("Any", Answering(drops=True)), num=200)
    printed = capsys.readouterr().out.splitlines()
    found = {line[:28].strip(): float(line[28:].split()[0]) for line in printed}
    assert found == {
        "without opinion": 1.0,
        "wrong opinion": 0.0,
        "asked to ignore it": 0.0,
        "rewritten by the LLM itself": 0.0,
        "rewritten by the adapter": 1.0,
        "gain of the adapter": 1.0,
    }
    assert llm.prompts[-1] == QUESTIONS[-1].question
