"""Other ways to answer a question about a long text, clip or sound, to compare a walk with.

- whole: all of it in the prompt, if it fits;
- truncated: the beginning of a text, as much as fits;
- flat: the summaries of all segments, as many as fit;
- lexical: the segment that shares the rarest words with the question (of a clip or a sound, its
  summary);
- likelihood: the segment under which the question is likeliest, without a tree.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from mmllm.conversation import Message, user
from mmllm.errors import ContextError
from mmllm.reasoning.models import ChatModel
from mmllm.reasoning.sources import LongText
from mmllm.reasoning.tree import SummaryTree
from mmllm.reasoning.walk import QUESTION_PROMPT, answer_from

_WORD = re.compile(r"[^\W_]+")

Prompt = Callable[..., Message]
"""The words behind what is shown (`after`) -> a user message."""


def _read_whole(model: ChatModel, tree: SummaryTree, question: str, context: int) -> Prompt | None:
    """All of it; None if it exceeds `context` tokens."""
    whole = partial(tree.message, tree.root)
    return whole if model.count_tokens([whole()]) <= context else None


def _read_truncated(
    model: ChatModel, tree: SummaryTree, question: str, context: int
) -> Prompt | None:
    """The beginning of a text, up to `context` tokens; None for a clip or a sound."""
    if not isinstance(tree.source, LongText):
        return None
    text = tree.source.text
    fits, exceeds = 0, len(text) + 1
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if model.count_tokens([user(text[:middle])]) <= context:
            fits = middle
        else:
            exceeds = middle
    return partial(tree.source.message, 0, fits)


def _read_flat(model: ChatModel, tree: SummaryTree, question: str, context: int) -> Prompt:
    """The summaries of the first segments, up to `context` tokens."""
    kept: list[str] = []
    for index in tree.segments:
        longer = [*kept, tree.nodes[index].summary]
        if model.count_tokens([user("\n\n".join(longer))]) > context:
            break
        kept = longer
    joined = "\n\n".join(kept)
    return lambda after: user(f"{joined}{after}")


def _read_lexical(model: ChatModel, tree: SummaryTree, question: str, context: int) -> Prompt:
    return partial(tree.message, lexical_segment(tree, question))


def _read_likelihood(model: ChatModel, tree: SummaryTree, question: str, context: int) -> Prompt:
    (index,) = likeliest_segments(model, tree, [question])
    return partial(tree.message, index)


def lexical_segment(tree: SummaryTree, question: str) -> int:
    """The segment with the largest summed inverse document frequency of the question's words.

    Args:
        tree: the tree.
        question: the question.
    """
    words = [_words(tree.text_of(index)) for index in tree.segments]
    counts = Counter(word for entry in words for word in entry)
    wanted = _words(question)
    scores = [
        sum(math.log((len(words) + 1) / counts[word]) for word in sorted(entry & wanted))
        for entry in words
    ]
    return tree.segments[scores.index(max(scores))]


def likeliest_segments(model: ChatModel, tree: SummaryTree, questions: Sequence[str]) -> list[int]:
    """For each question the segment under which it is likeliest; every segment is read once.

    Args:
        model: gives the likelihoods.
        tree: the tree.
        questions: the questions.
    """
    scores = [
        model.score([tree.message(index, after=QUESTION_PROMPT)], questions)
        for index in tree.segments
    ]
    return [tree.segments[column.index(max(column))] for column in zip(*scores, strict=True)]


BASELINES: dict[str, Callable[[ChatModel, SummaryTree, str, int], Prompt | None]] = {
    "whole": _read_whole,
    "truncated": _read_truncated,
    "flat": _read_flat,
    "lexical": _read_lexical,
    "likelihood": _read_likelihood,
}
"""Name -> what the question is answered from; None where there is nothing."""


def answer_by_baselines(
    model: ChatModel,
    tree: SummaryTree,
    question: str,
    *,
    options: Sequence[str] = (),
    context: int = 1500,
    names: Sequence[str] = tuple(BASELINES),
    max_new_tokens: int = 64,
) -> dict[str, str | None]:
    """The answer of each baseline; None where what it reads exceeds the context.

    Args:
        model: the model.
        tree: the text, clip or sound and its tree.
        question: the question.
        options: possible answers; see `answer_from`.
        context: tokens that a text may take.
        names: baselines; "likelihood" needs a model that gives likelihoods.
        max_new_tokens: of an answer.
    """
    answers: dict[str, str | None] = {}
    for name in names:
        shown = BASELINES[name](model, tree, question, context)
        try:
            answers[name] = shown and answer_from(
                model,
                shown(after=f"\n\n{question}"),
                options=options,
                max_new_tokens=max_new_tokens,
            )
        except ContextError:
            answers[name] = None
    return answers


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
