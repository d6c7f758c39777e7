"""Verified replies: tries, verdicts, feedback, thinking first and looking again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from mmllm.conversation import Image, Medium, Message, Text, assistant, user
from mmllm.errors import ConfigError
from mmllm.inference.replies import Reply
from mmllm.reasoning.verified import ReplyVerdict, Verification, as_verdict, verified_reply
from tests.samples import picture

REQUEST = [user("Draw a red apple.")]


@dataclass
class ScriptedChat:
    """Replies with a picture of the seed's value; `written` is what it says of a picture."""

    written: str = "It is an apple."
    prompts: list[Sequence[Message]] = field(default_factory=list)
    questions: list[Sequence[Message]] = field(default_factory=list)

    def answer(self, messages: Sequence[Message], seed: int) -> Reply:
        self.prompts.append(messages)
        return Reply(assistant("Here:", picture(seed)), seed=seed, ids=[])

    def write(self, messages: Sequence[Message], seed: int) -> Reply:
        self.questions.append(messages)
        return Reply(assistant(self.written), seed=seed, ids=[])


def value(reply: Reply) -> int:
    assert reply.image is not None
    return int(reply.image.to_numpy()[0, 0, 0])


def verified(chat: ScriptedChat, **options: Any) -> Reply:
    return verified_reply(chat.answer, chat.write, REQUEST, seed=5, **options)


def test_the_first_accepted_reply_is_returned_with_its_tries_and_reasons() -> None:
    chat = ScriptedChat()
    reply = verified(chat, verify=lambda reply: "" if value(reply) == 7 else f"{value(reply)}!")
    assert value(reply) == reply.seed == 7
    assert reply.verification == Verification(True, 3, 3, ("5!", "6!"))
    assert reply.notes == ("verified: try 3 of 3; try 1: 5!; try 2: 6!",)
    assert [list(prompt) for prompt in chat.prompts] == [REQUEST] * 3


def test_the_first_try_is_the_plain_reply() -> None:
    reply = verified(ScriptedChat(), verify=lambda _: True)
    assert reply.seed == 5
    assert reply.verification == Verification(True, 1, 1)


@pytest.mark.parametrize("tries", [1, 2, 6])
def test_the_tries_are_kept_and_the_best_of_them_is_returned(tries: int) -> None:
    chat = ScriptedChat()
    scores = {5: 0.2, 6: 0.9, 7: 0.9, 8: 0.1, 9: 0.3, 10: 0.0}
    reply = verified(
        chat, verify=lambda reply: ReplyVerdict(False, "no", scores[reply.seed]), tries=tries
    )
    assert len(chat.prompts) == tries
    assert reply.seed == (5 if tries == 1 else 6)
    assert reply.verification is not None
    assert not reply.verification.passed
    assert reply.verification.reasons == ("no",) * tries
    assert str(reply.verification).startswith(f"not verified: try {reply.seed - 4} of {tries}")


def test_with_feedback_a_reply_is_sent_back_with_what_is_wrong() -> None:
    chat = ScriptedChat()
    verified(chat, verify=lambda reply: reply.seed > 5 or "It is green.", feedback=True)
    first, second = chat.prompts
    assert first == REQUEST
    assert second[0] == REQUEST[0]
    assert second[1].media
    assert second[2].text == "This is wrong. It is green."
    assert second[3] == REQUEST[0]


def test_the_model_thinks_first_where_it_is_asked_to() -> None:
    chat = ScriptedChat("A round red fruit.")
    reply = verified(chat, think_first=True)
    assert chat.questions[0][-1].text.startswith("Describe in one sentence")
    assert [message.text for message in chat.prompts[0]] == [
        "Draw a red apple.",
        "A round red fruit.",
        "Draw a red apple.",
    ]
    assert reply.notes == ("thought first: A round red fruit.",)
    assert reply.verification is None


@pytest.mark.parametrize(
    ("written", "passed"),
    [("It is an apple.", True), ("An APPLE?", True), ("It is a dog.", False), ("", False)],
)
def test_looking_again_the_model_must_name_what_was_requested(written: str, passed: bool) -> None:
    chat = ScriptedChat(written)
    reply = verified(chat, verify="look-again", tries=2)
    assert reply.verification is not None
    assert reply.verification.passed == passed
    assert reply.verification.num_tries == (1 if passed else 2)
    (shown,) = chat.questions[0]
    assert isinstance(shown.parts[0], Image)
    assert shown.parts[1] == Text("What is this?")
    if written and not passed:
        assert reply.verification.reasons[0] == "it looks like this: 'It is a dog.'"


def test_looking_again_a_reply_without_media_is_wrong() -> None:
    chat = ScriptedChat()
    chat.answer = lambda messages, seed: Reply(assistant("no"), seed=seed, ids=[])  # pyright: ignore
    reply = verified(chat, verify="look-again", tries=1)
    assert reply.verification is not None
    assert reply.verification.reasons == ("the reply holds no image, audio or video",)


@pytest.mark.parametrize(
    ("found", "passed", "reason"),
    [
        (True, True, ""),
        (None, True, ""),
        ("", True, ""),
        (False, False, "it was not accepted"),
        ("too dark", False, "too dark"),
    ],
)
def test_what_a_verifier_may_return(found: Any, passed: bool, reason: str) -> None:
    assert as_verdict(found) == ReplyVerdict(passed, reason)


def test_mistakes_are_refused_with_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"a ReplyVerdict, True or None .*, got 3"):
        verified(ScriptedChat(), verify=lambda _: 3)
    with pytest.raises(ConfigError, match="unknown verifier 'judg'; did you mean 'judge'"):
        verified(ScriptedChat(), verify="judg")
    with pytest.raises(ConfigError, match="expected a function or a name, got 3"):
        verified(ScriptedChat(), verify=3)
    with pytest.raises(ConfigError, match="tries: expected at least 1, got 0"):
        verified(ScriptedChat(), verify=lambda _: True, tries=0)


def test_the_judge_finds_the_concept_that_was_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmllm.evaluation import verifiers

    class Judge:
        def rank(self, media: list[Medium]) -> list[list[str]]:
            values = [int(medium.to_numpy().flat[0]) for medium in media]
            return [["dog", "cat", "red-apple"] if v < 6 else ["cat", "dog"] for v in values]

    monkeypatch.setattr(verifiers, "cached_judge", lambda _: Judge())
    messages = [user("Draw a cat.")]
    chat = ScriptedChat()
    reply = verified_reply(chat.answer, chat.write, messages, seed=5, verify="judge")
    assert reply.seed == 6
    assert reply.verification == Verification(True, 2, 2, ("the image is nearest to dog",))
    with pytest.raises(ConfigError, match="names none of the concepts"):
        verified_reply(chat.answer, chat.write, [user("Draw it.")], seed=5, verify="judge")


def test_the_judge_prefers_the_nearer_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmllm.evaluation import verifiers

    class Judge:
        def rank(self, media: list[Medium]) -> list[list[str]]:
            seeds = {5: ["a", "b", "c", "cat"], 6: ["a", "cat", "b"], 7: ["a", "b", "cat"]}
            return [seeds[int(medium.to_numpy().flat[0])] for medium in media]

    monkeypatch.setattr(verifiers, "cached_judge", lambda _: Judge())
    chat = ScriptedChat()
    reply = verified_reply(
        chat.answer, chat.write, [user("Draw a cat.")], seed=5, verify="judge", tries=3
    )
    assert reply.seed == 6
    assert replace(reply).verification == Verification(
        False, 3, 2, ("the image is nearest to a",) * 3
    )
