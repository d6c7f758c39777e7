"""The row of MemWalker: questions about long texts, answered by a walk and in other ways."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mmllm.conversation import Message
from mmllm.evaluation.metrics import Metric, accuracy_metric, difference_metric, with_gain
from mmllm.evaluation.reasoning.planted import NAMES, long_texts
from mmllm.evaluation.reasoning.searching import OnProgress
from mmllm.inference.chat import Chat
from mmllm.reasoning.models import ChatModel
from mmllm.reasoning.reading import answer_by_baselines, likeliest_segments
from mmllm.reasoning.tree import SummaryTree, TreeOptions, build_tree
from mmllm.reasoning.walk import walk

NUM_QUESTIONS = 60
MIN_GAIN = 0.3
"""Of a walk over the whole text in the prompt."""
OPTIONS = TreeOptions(segment_tokens=200, num_children=8, summary_tokens=60)
CONTEXT = 900
"""Tokens of a text that is shown to mini, whose context has 1,024."""
_BASELINES = {
    "truncated": f"first {CONTEXT} tokens",
    "flat": f"summaries of all segments, up to {CONTEXT} tokens",
    "lexical": "segment with the rarest shared words",
}
_ASK_AND_ANSWER = "\n\nAsk a question about this text, and answer it."


def measure_memwalker(
    model: ChatModel, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """Questions about facts that are planted in texts of about 4,300 tokens, ten in each; no word
    of a question is in its fact, and ten names are the possible answers.

    The whole text is read within the window that the LLM was trained with, once for all of its
    questions: these and their answers are scored behind it. The right segment, read in the same
    way, is the control.

    Args:
        model: what is measured.
        data: folder of mini's data.
        num: number of questions.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    book = (data / "text" / "alice.txt").read_text(encoding="utf-8")
    right: dict[str, list[bool]] = {
        name: [] for name in ("walk", "ends", "whole", "given", "likelihood", *_BASELINES)
    }
    for text in long_texts(book, -(-num // len(NAMES))):
        tree = build_tree(model, text.text, OPTIONS)
        asked = text.questions[: num - len(right["walk"])]
        questions = [question for question, _ in asked]
        with _whole_window(model):
            whole = _in_one_pass(model, tree.message(tree.root, after=_ASK_AND_ANSWER), questions)
        likeliest = likeliest_segments(model, tree, questions)
        for number, (question, name) in enumerate(asked):
            planted = text.planted[number]
            found = walk(model, tree, question, options=NAMES, memory_tokens=100)
            right["walk"].append(found.answer == name)
            right["ends"].append(bool(found.answer) and _holds(tree, found.segments[-1], planted))
            right["whole"].append(whole[number] == name)
            given = next(index for index in tree.segments if _holds(tree, index, planted))
            prompt = tree.message(given, after=_ASK_AND_ANSWER)
            right["given"].append(_in_one_pass(model, prompt, [question]) == [name])
            right["likelihood"].append(_holds(tree, likeliest[number], planted))
            answers = answer_by_baselines(
                model, tree, question, options=NAMES, context=CONTEXT, names=list(_BASELINES)
            )
            for baseline, answer in answers.items():
                right[baseline].append(answer == name)
            on_progress(1)
    row = "reasoning/memwalker"
    metric = difference_metric(f"{row}, walk - whole", right["walk"], right["whole"], start)
    yield with_gain(metric, MIN_GAIN)
    yield accuracy_metric(f"{row}, walk by likelihood", right["walk"], start)
    yield accuracy_metric(f"{row}, walk ends at the right segment", right["ends"], start)
    yield accuracy_metric(f"{row}, whole text", right["whole"], start)
    yield accuracy_metric(f"{row}, right segment, read as the whole text is", right["given"], start)
    for baseline, label in _BASELINES.items():
        yield accuracy_metric(f"{row}, {label}", right[baseline], start)
    label = "the right segment is that of the largest likelihood, no tree"
    yield accuracy_metric(f"{row}, {label}", right["likelihood"], start)


def _in_one_pass(model: ChatModel, prompt: Message, questions: Sequence[str]) -> list[str]:
    """The likeliest name as the answer to each question, all scored behind one prompt."""
    replies = [f"{question} {name}" for question in questions for name in NAMES]
    scores = model.score([prompt], replies)
    rows = [scores[start : start + len(NAMES)] for start in range(0, len(scores), len(NAMES))]
    return [NAMES[row.index(max(row))] for row in rows]


def _holds(tree: SummaryTree, index: int, sentence: str) -> bool:
    return sentence in tree.text_of(index)


@contextmanager
def _whole_window(model: ChatModel) -> Iterator[None]:
    """The context of a chat is as long as its LLM allows."""
    if not isinstance(model, Chat):
        yield
        return
    llm = model.model.llm
    config = llm.config
    llm.config = replace(config, max_length=8192)
    try:
        yield
    finally:
        llm.config = config
