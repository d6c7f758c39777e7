"""Walks through a tree of summaries to the segment that answers a question (MemWalker).

The tree may be that of a text, a clip or a sound.

At every inner node one child is chosen, at a segment the model answers or goes back; a child that
was left is not chosen again. Working memory holds the summaries on the way. The choice is

- written: the paper's way; the model writes the number of a summary, and may reason before;
- by likelihood: the child under whose summary the question is likeliest. It cannot be malformed,
  and small models choose well by it that write numbers at random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mmllm.conversation import Message, user
from mmllm.errors import ConfigError, quoted
from mmllm.reasoning.models import ChatModel
from mmllm.reasoning.tree import SummaryTree

Choice = Literal["likelihood", "written"]
_MAX_INVALID = 3
"""Unusable outputs after which a walk ends without an answer."""
_ACTION = re.compile(r"action\s*:?\s*(-?\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+")
_ANSWER = re.compile(r"answer\s*:\s*(.*)", re.IGNORECASE | re.DOTALL)
_GO_BACK, _COMMIT = -1, -2


@dataclass
class Walk:
    """The answer of a walk, and how it came about.

    Attributes:
        question: what was asked.
        answer: the answer; None if none was found.
        path: nodes in the order in which they were visited, from the root.
        segments: segments that were read, in order; the last one gave the answer.
        read_fraction: length of these segments, of the whole.
        num_returns: how often a node was left without an answer.
        invalid: outputs that were no action.
        stopped: why it ended: "answered", "invalid" (three unusable outputs) or "exhausted" (no
            segment was accepted).
    """

    question: str
    answer: str | None = None
    path: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    read_fraction: float = 0.0
    num_returns: int = 0
    invalid: list[str] = field(default_factory=list)
    stopped: Literal["answered", "invalid", "exhausted", ""] = ""

    @property
    def note(self) -> str:
        """Why there is no answer, in words; empty with one."""
        if self.stopped == "invalid":
            return (
                f"{_MAX_INVALID} outputs in a row were no action; the last one: "
                f"{quoted(self.invalid[-1])}"
            )
        return "no segment was accepted" if self.stopped == "exhausted" else ""


def walk(
    model: ChatModel,
    tree: SummaryTree,
    question: str,
    *,
    choose: Choice = "likelihood",
    options: Sequence[str] = (),
    reason: bool = True,
    memory_tokens: int = 400,
    max_new_tokens: int = 128,
) -> Walk:
    """Answer a question by a walk.

    Args:
        model: the model that built the tree.
        tree: the tree.
        question: the question.
        choose: how a child is chosen, and whether a segment answers the question.
        options: possible answers, of which the likeliest is chosen; none: the model writes one.
        reason: whether the model is asked to reason before it writes a choice. It helps large
            models and harms small ones (the paper's table 4).
        memory_tokens: tokens of the summaries on the way that are shown with a segment; the newest
            ones are kept.
        max_new_tokens: of what the model writes.

    Raises:
        ConfigError: the tree is that of another model, `choose` is unknown, or the model gives no
            likelihoods where they are needed.
        CallError, BudgetError: as the model raises them.
    """
    if choose not in ("likelihood", "written"):
        raise ConfigError(f"choose: expected likelihood or written, got {quoted(choose)}")
    if model.fingerprint != tree.model:
        raise ConfigError(
            f"the tree was built by another model ({tree.model}, not {model.fingerprint}); build "
            "one with this model"
        )
    walker = _Walker(
        model, tree, Walk(question), choose, options, reason, memory_tokens, max_new_tokens
    )
    walker.visit(tree.root, [])
    found = walker.walk
    found.stopped = found.stopped or "exhausted"
    read = sum(tree.nodes[index].end - tree.nodes[index].start for index in set(found.segments))
    found.read_fraction = read / len(tree.source)
    return found


QUESTION_PROMPT = "\n\nWrite a question about this text."


def question_likelihood(model: ChatModel, text: str, question: str) -> float:
    """log p of a question as a question about a text.

    Args:
        model: gives the likelihood.
        text: the text; empty for the likelihood without any.
        question: the question.
    """
    prompt = f"{text}{QUESTION_PROMPT}" if text else "Write a question."
    return model.score([user(prompt)], [question])[0]


def answer_from(
    model: ChatModel, prompt: Message, *, options: Sequence[str] = (), max_new_tokens: int = 64
) -> str:
    """Answer a question.

    Args:
        model: answers, greedily.
        prompt: what is known, and the question.
        options: possible answers, of which the likeliest is chosen; none: the model writes one.
        max_new_tokens: of what it writes.
    """
    if options:
        scores = model.score([prompt], options)
        return options[scores.index(max(scores))]
    return model.complete([prompt], temperature=0.0, max_new_tokens=max_new_tokens)[0].text.strip()


@dataclass
class _Walker:
    """One walk; `visit` returns whether it is over."""

    model: ChatModel
    tree: SummaryTree
    walk: Walk
    choose: Choice
    options: Sequence[str]
    reason: bool
    memory_tokens: int
    max_new_tokens: int
    num_invalid: int = 0
    output: str = ""

    def visit(self, index: int, memory: list[str]) -> bool:
        self.walk.path.append(index)
        node = self.tree.nodes[index]
        if not node.children:
            return self._read(index, memory)
        remaining = list(node.children)
        while remaining:
            child = self._choose(remaining, memory)
            if child is None:
                return self.walk.stopped != ""
            if self.visit(child, [*memory, node.summary]):
                return True
            remaining.remove(child)
            self.walk.num_returns += 1
            self.walk.path.append(index)
        return False

    def _choose(self, children: list[int], memory: list[str]) -> int | None:
        """A child; None to go back, or at the end of the walk."""
        summaries = [self.tree.nodes[child].summary for child in children]
        if self.choose == "likelihood":
            if len(children) == 1:
                return children[0]
            scores = [
                question_likelihood(self.model, summary, self.walk.question)
                for summary in summaries
            ]
            return children[scores.index(max(scores))]
        prompt = _triage_prompt(self.walk.question, summaries, reason=self.reason)
        action = self._act(user(prompt), range(_GO_BACK, len(children)))
        return None if action is None or action == _GO_BACK else children[action]

    def _read(self, index: int, memory: list[str]) -> bool:
        """Answer from a segment, unless it is not about the question."""
        self.walk.segments.append(index)
        background = self._fitting(memory)
        if self.choose == "likelihood":
            prompt = self.tree.message(index, after=QUESTION_PROMPT)
            (about,) = self.model.score([prompt], [self.walk.question])
            if about <= question_likelihood(self.model, "", self.walk.question):
                return False
            self._answer(index, background)
            return True
        before, after = _segment_prompt(self.walk.question, background, reason=self.reason)
        prompt = self.tree.message(index, before=before, after=after)
        action = self._act(prompt, (_GO_BACK, _COMMIT))
        if action == _COMMIT:
            written = _ANSWER.search(self.output)
            if written and written[1].strip() and not self.options:
                self.walk.answer, self.walk.stopped = written[1].strip(), "answered"
            else:
                self._answer(index, background)
        return self.walk.stopped != ""

    def _answer(self, index: int, background: list[str]) -> None:
        before = "".join(f"{summary}\n\n" for summary in background)
        prompt = self.tree.message(index, before=before, after=f"\n\n{self.walk.question}")
        self.walk.answer = answer_from(
            self.model, prompt, options=self.options, max_new_tokens=self.max_new_tokens
        )
        self.walk.stopped = "answered"

    def _act(self, prompt: Message, allowed: Sequence[int]) -> int | None:
        """The action that the model writes; None after three unusable outputs in a row."""
        while True:
            (completion,) = self.model.complete(
                [prompt],
                temperature=1.0 if self.num_invalid else 0.0,
                max_new_tokens=self.max_new_tokens,
                seed=self.num_invalid,
            )
            self.output = completion.text
            found = _ACTION.findall(completion.text) or _NUMBER.findall(completion.text)[:1]
            if found and len(found[-1]) < 9 and int(found[-1]) in allowed:
                self.num_invalid = 0
                return int(found[-1])
            self.num_invalid += 1
            self.walk.invalid.append(completion.text)
            if self.num_invalid == _MAX_INVALID:
                self.walk.stopped = "invalid"
                return None

    def _fitting(self, memory: list[str]) -> list[str]:
        """The newest summaries that fit into the working memory."""
        kept: list[str] = []
        for summary in reversed(memory):
            if self.model.count_tokens([user("\n\n".join([summary, *kept]))]) > self.memory_tokens:
                break
            kept.insert(0, summary)
        return kept


def _triage_prompt(question: str, summaries: Sequence[str], *, reason: bool) -> str:
    """The paper's prompt at an inner node."""
    listed = "\n\n".join(f"Summary {number}: {text}" for number, text in enumerate(summaries))
    numbers = " / ".join(map(str, range(len(summaries))))
    first = (
        "First provide reasoning to compare the summaries before you make the decision. "
        if reason
        else ""
    )
    form = "Reasoning: ...\nAction: " if reason else "Action: "
    return (
        "The following passages are the summaries of different parts of a text. To answer the "
        f"question: {question}\nWhich of the following summaries is MOST LIKELY to contain "
        f"information about the answer? {first}\n\n{listed}\n\nReply with the number of the summary"
        f" as your action, or with -1 if none can help, in this format:\n{form}{numbers} / -1"
    )


def _segment_prompt(question: str, background: Sequence[str], *, reason: bool) -> tuple[str, str]:
    """The paper's prompt at a segment: what comes before the segment, and what comes behind it."""
    known = "Background information:\n" + "\n\n".join(background) + "\n\n" if background else ""
    form = "Reasoning: ...\n" if reason else ""
    return (
        f"Read the text in triple quotes and answer a question.\n{known}Main text:\n'''",
        f"'''\n{question}\nIf the answer CANNOT be inferred from the text above, reply with action "
        "-1. If the answer CAN be inferred from the text above, reply with action -2, and also "
        f"provide the final answer, in this format:\n{form}Action: -2 or -1\nAnswer: ...",
    )
