"""Verified generation: a reply is made again until an independent check accepts it.

Best of n by a verifier (Cobbe et al. 2021, arXiv:2110.14168), for text and for generated media: the
check is the caller's function, a judge of generated media, or the model itself looking at what it
made. Each try has a seed of its own, so that the same seed gives the same tries.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mmllm.conversation import Message, assistant, user
from mmllm.errors import ConfigError, quoted
from mmllm.utils.hints import did_you_mean

DEFAULT_TRIES = 4

LOOK_AGAIN = "look-again"
VERIFIERS = {"judge": "mmllm.evaluation.verifiers:concept_judge"}
"""Name of a verifier -> "module:function", imported when it is named; the function takes the
conversation and returns the verifier."""


@dataclass(frozen=True)
class ReplyVerdict:
    """What a verifier finds.

    Attributes:
        passed: whether the reply is accepted.
        reason: what is wrong with it, in words.
        score: larger for better replies; if none is accepted the best one is returned.
    """

    passed: bool
    reason: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class Verification:
    """How a reply was verified.

    Attributes:
        passed: whether the verifier accepted it.
        num_tries: replies that were made.
        chosen: which of them was returned, from 1.
        reasons: what was wrong with each one that was not accepted, in order.
    """

    passed: bool
    num_tries: int
    chosen: int
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = "verified" if self.passed else "not verified"
        wrong = "".join(f"; try {n}: {why}" for n, why in enumerate(self.reasons, start=1))
        return f"{found}: try {self.chosen} of {self.num_tries}{wrong}"


Verifier: TypeAlias = Callable[[Any], "ReplyVerdict | bool | str | None"]
"""Takes a Reply. A ReplyVerdict; or True or None for accepted, False or what is wrong as text."""

Answer: TypeAlias = Callable[[Sequence[Message], int], Any]
"""(conversation, seed) -> Reply."""


def verified_reply(
    answer: Answer,
    write: Answer,
    messages: Sequence[Message],
    *,
    seed: int,
    verify: Verifier | str | None = None,
    tries: int = DEFAULT_TRIES,
    feedback: bool = False,
    think_first: bool = False,
) -> Any:
    """Reply to a conversation until a verifier accepts the reply.

    Args:
        answer: makes a reply.
        write: makes a reply of text alone.
        messages: the conversation.
        seed: of the first try; the next ones count up.
        verify: a function of the reply; "judge", "look-again"; None accepts the first reply.
        tries: replies at most.
        feedback: whether a reply that was not accepted is sent back with what is wrong; else every
            try has the same prompt.
        think_first: whether the model first writes what it will make, as a turn of its own.

    Returns:
        The first reply that is accepted, or else the one with the best score; its `verification`
        and its notes say how many tries it took, and why.

    Raises:
        ConfigError: `tries` is below 1, the verifier's name is unknown, or it returns none of what
            a verifier returns.
    """
    if tries < 1:
        raise ConfigError(f"tries: expected at least 1, got {tries}")
    check = _verifier(verify, write, messages, seed)
    notes: tuple[str, ...] = ()
    prompt = list(messages)
    if think_first:
        thought = write([*messages, user(_THINK)], seed).text.strip()
        prompt += [assistant(thought), messages[-1]]
        notes = (f"thought first: {thought}",)
    replies: list[Any] = []
    verdicts: list[ReplyVerdict] = []
    while not (verdicts and verdicts[-1].passed) and len(replies) < tries:
        replies.append(answer(prompt, seed + len(replies)))
        verdicts.append(as_verdict(check(replies[-1])))
        if feedback and not verdicts[-1].passed:
            wrong = f"{_WRONG} {verdicts[-1].reason}".strip()
            prompt = [*prompt, replies[-1].message, user(wrong), messages[-1]]
    best = max(
        range(len(replies)), key=lambda index: (verdicts[index].passed, verdicts[index].score)
    )
    verification = Verification(
        passed=verdicts[best].passed,
        num_tries=len(replies),
        chosen=best + 1,
        reasons=tuple(verdict.reason for verdict in verdicts if not verdict.passed),
    )
    reply = replies[best]
    if verify is None:
        return replace(reply, notes=(*reply.notes, *notes))
    return replace(
        reply, notes=(*reply.notes, *notes, str(verification)), verification=verification
    )


_THINK = "Describe in one sentence what you will make. Do not make it yet."
_WRONG = "This is wrong."


def as_verdict(found: Any) -> ReplyVerdict:
    """What a verifier returned, as a ReplyVerdict. Raises ConfigError for anything else."""
    if isinstance(found, ReplyVerdict):
        return found
    if found is None or found is True:
        return ReplyVerdict(True)
    if found is False:
        return ReplyVerdict(False, "it was not accepted")
    if isinstance(found, str):
        return ReplyVerdict(not found, found)
    raise ConfigError(
        "verify: expected a function that returns a ReplyVerdict, True or None (accepted), False, "
        f"or what is wrong as text, got {quoted(found)}"
    )


def look_again(write: Answer, messages: Sequence[Message], seed: int = 0) -> Verifier:
    """A verifier by which the model looks at what it made: it is asked what each medium is, and
    must name something of the request.

    Args:
        write: makes a reply of text alone.
        messages: the conversation with the request.
        seed: of the questions.
    """
    requested = _content_words(messages[-1].text)

    def verify(reply: Any) -> ReplyVerdict:
        if not reply.media:
            return ReplyVerdict(False, "the reply holds no image, audio or video", -1.0)
        seen = [write([user(medium, "What is this?")], seed).text for medium in reply.media]
        found = [bool(_content_words(text) & requested) for text in seen]
        missed = [text.strip() for text, is_found in zip(seen, found, strict=True) if not is_found]
        reason = f"it looks like this: {quoted('; '.join(missed))}" if missed else ""
        return ReplyVerdict(not missed, reason, sum(found) / len(found))

    return verify


def _verifier(
    verify: Verifier | str | None, write: Answer, messages: Sequence[Message], seed: int
) -> Verifier:
    if verify is None:
        return lambda _: None
    if not isinstance(verify, str):
        if not callable(verify):
            raise ConfigError(f"verify: expected a function or a name, got {quoted(verify)}")
        return verify
    if verify == LOOK_AGAIN:
        return look_again(write, messages, seed)
    if verify not in VERIFIERS:
        known = [*VERIFIERS, LOOK_AGAIN]
        hint = did_you_mean(verify, known)
        raise ConfigError(
            f"verify: unknown verifier {verify!r}{hint}; known are {', '.join(known)}, or give a "
            "function of the reply"
        )
    module, _, name = VERIFIERS[verify].partition(":")
    return getattr(importlib.import_module(module), name)(messages)


def _content_words(text: str) -> set[str]:
    """The words that name something, roughly: of three letters or more, without common ones."""
    return _words(text) - _COMMON


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{3,}", text.lower()))


_COMMON = _words(
    "the this that what who and for with you your can could would please here there are was its "
    "draw paint make show play animate create generate give sound picture image photo clip video "
    "audio drawing animation want like look looks see hear some something one two"
)
