"""Other ways to answer a question about a long text, to compare a walk with.

- whole: the whole text in the prompt, if it fits;
- truncated: its beginning, as much as fits;
- flat: the summaries of all segments, as many as fit;
- lexical: the segment that shares the rarest words with the question;
- likelihood: the segment under which the question is likeliest, without a tree.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from mmllm.conversation import user
from mmllm.errors import ContextError
from mmllm.reasoning.models import ChatModel
from mmllm.reasoning.tree import SummaryTree
from mmllm.reasoning.walk import answer_from, question_likelihood

_WORD = re.compile(r"[^\W_]+")


def _read_whole(model: ChatModel, tree: SummaryTree, question: str, context: int) -> str | None:
    """The whole text; None if it exceeds `context` tokens."""
    return tree.text if model.count_tokens([user(tree.text)]) <= context else None


def _read_truncated(model: ChatModel, tree: SummaryTree, question: str, context: int) -> str:
    """The beginning of the text, up to `context` tokens."""
    fits, exceeds = 0, len(tree.text) + 1
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if model.count_tokens([user(tree.text[:middle])]) <= context:
            fits = middle
        else:
            exceeds = middle
    return tree.text[:fits]


def _read_flat(model: ChatModel, tree: SummaryTree, question: str, context: int) -> str:
    """The summaries of the first segments, up to `context` tokens."""
    kept: list[str] = []
    for index in tree.segments:
        longer = [*kept, tree.nodes[index].summary]
        if model.count_tokens([user("\n\n".join(longer))]) > context:
            break
        kept = longer
    return "\n\n".join(kept)


def _read_lexical(model: ChatModel, tree: SummaryTree, question: str, context: int) -> str:
    """The segment with the largest summed inverse document frequency of the question's words."""
    texts = [tree.text_of(index) for index in tree.segments]
    words = [_words(text) for text in texts]
    counts = Counter(word for entry in words for word in entry)
    wanted = _words(question)
    scores = [
        sum(math.log((len(texts) + 1) / counts[word]) for word in sorted(entry & wanted))
        for entry in words
    ]
    return texts[scores.index(max(scores))]


def _read_likelihood(model: ChatModel, tree: SummaryTree, question: str, context: int) -> str:
    """The segment under which the question is likeliest."""
    texts = [tree.text_of(index) for index in tree.segments]
    scores = [question_likelihood(model, text, question) for text in texts]
    return texts[scores.index(max(scores))]


BASELINES: dict[str, Callable[[ChatModel, SummaryTree, str, int], str | None]] = {
    "whole": _read_whole,
    "truncated": _read_truncated,
    "flat": _read_flat,
    "lexical": _read_lexical,
    "likelihood": _read_likelihood,
}
"""Name -> the text from which the question is answered; None where there is none."""


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
    """The answer of each baseline; None where its text exceeds the context.

    Args:
        model: the model.
        tree: the text and its tree.
        question: the question.
        options: possible answers; see `answer_from`.
        context: tokens that a text may take.
        names: baselines; "likelihood" needs a model that gives likelihoods.
        max_new_tokens: of an answer.
    """
    answers: dict[str, str | None] = {}
    for name in names:
        text = BASELINES[name](model, tree, question, context)
        try:
            answers[name] = text and answer_from(
                model, text, question, options=options, max_new_tokens=max_new_tokens
            )
        except ContextError:
            answers[name] = None
    return answers


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
