"""The rows of MemWalker, with a scripted model that knows the planted facts."""

from __future__ import annotations

import re

import pytest

from mmllm import mini
from mmllm.evaluation.reasoning import ROWS
from mmllm.evaluation.reasoning.planted import FACTS, NAMES, long_texts
from mmllm.reasoning import ScriptedModel

DATA = mini.locate("data")
BOOK = (DATA / "text" / "alice.txt").read_text(encoding="utf-8")
SENTENCES = {question: sentence for sentence, question in FACTS}
_COMMON = "who is a an the of in to and has was at with on had"
COMMON = set(_COMMON.split())


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower())) - COMMON


@pytest.mark.parametrize(("sentence", "question"), FACTS)
def test_no_question_shares_a_word_with_its_fact(sentence: str, question: str) -> None:
    assert sentence.count("{}") == 1
    stems = {word[:5] for word in words(question)}
    assert not stems & {word[:5] for word in words(sentence)}


def test_texts_hold_each_fact_once_about_somebody_whom_the_book_does_not_know() -> None:
    texts = long_texts(BOOK, 6)
    asked = [question for text in texts for question, _ in text.questions]
    assert len(set(asked)) == len(FACTS) == 60
    assert not any(name in BOOK for name in NAMES)
    for text in texts:
        assert all(text.text.count(sentence) == 1 for sentence in text.planted)
        assert {name for _, name in text.questions} == set(NAMES)
        assert 4000 < len(text.text) / 4.2 < 8000
    assert texts == long_texts(BOOK, 6)


def known(text: str, question: str) -> str:
    """Who does what a question asks, according to a text; empty if it does not say."""
    pattern = re.escape(SENTENCES[question]).replace(re.escape("{}"), r"(\w+)")
    found = re.search(pattern, text)
    return found[1] if found else ""


def summarise(text: str, rng) -> str:
    return " ".join(
        sentence for sentence in re.findall(r"[^\n.]*\.", text) if _is_planted(sentence)
    )


def _is_planted(sentence: str) -> bool:
    return any(name in sentence for name in NAMES)


def likelihood(text: str, reply: str) -> float:
    """Knows what a text of less than 1,000 words says."""
    question, _, answer = reply.partition("?")
    if answer:
        return float(len(text.split()) < 1000 and known(text, f"{question}?") == answer.strip())
    if reply in NAMES:
        return float(known(text, text.rpartition("\n\n")[2]) == reply)
    return float(bool(known(text, reply)))


def test_the_row_of_memwalker_counts_each_way_of_reading() -> None:
    done: list[int] = []
    row = "reasoning/memwalker"
    metrics = list(ROWS[row][0](ScriptedModel(summarise, likelihood), DATA, 12, done.append))
    found = {metric.name.removeprefix(f"{row}, "): metric for metric in metrics}
    assert sum(done) == 12
    assert all(metric.n == 12 for metric in metrics)
    for name in (
        "walk by likelihood",
        "walk ends at the right segment",
        "right segment, read as the whole text is",
        "the right segment is that of the largest likelihood, no tree",
    ):
        assert found[name].value == 1
    assert found["whole text"].value < 0.4
    assert found["segment with the rarest shared words"].value < 0.5
    assert found["walk - whole"].met
