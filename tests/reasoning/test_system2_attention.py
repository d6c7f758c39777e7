"""System 2 Attention: opinion out, question kept; every variant's prompt and conversation."""

from __future__ import annotations

import random

import pytest

from mmllm.conversation import Image, Text, assistant, system, user
from mmllm.errors import ConfigError
from mmllm.reasoning import ScriptedModel
from mmllm.reasoning.system2_attention import focus, instructed, rewriting_prompt, without_media
from tests.samples import picture, sound

OPINION = "I think the answer is Lyon but I am not sure."
QUESTION = "What is the capital of France?"
ASKED = [system("Be brief."), user(f"{QUESTION} {OPINION}")]
REWRITTEN = (
    "Unbiased text context (includes all content except user's bias):\nFrance is a country.\n\n"
    f"Question/Query (does not include user bias/preference): {QUESTION}\n"
)


def rewriter(text: str = REWRITTEN) -> ScriptedModel:
    return ScriptedModel(lambda *_: text)


def test_the_answer_is_given_from_the_rewritten_message_alone() -> None:
    model = rewriter()
    focused = focus(model, ASKED)
    assert [message.text for message in focused] == [
        "Be brief.",
        f"France is a country.\n\n{QUESTION}\n\nAnswer in an unbiased way.",
    ]
    *before, asked = model.conversations[0]
    assert before == ASKED[:1]
    assert asked.text == rewriting_prompt(f"{QUESTION} {OPINION}")
    assert "extract the part that is unbiased and not their opinion" in asked.text
    assert 'labeled with "Unbiased text context' in asked.text


def test_the_variants_of_the_paper() -> None:
    not_instructed = focus(rewriter(), ASKED, instruct=False)[-1].text
    assert not_instructed == f"France is a country.\n\n{QUESTION}"
    kept = focus(rewriter(), ASKED, keep_original=True)[-1].text
    assert kept.startswith(f"{QUESTION} {OPINION}\n\nFrance is a country.")
    model = rewriter(f"All in one. {QUESTION}")
    single = focus(model, ASKED, separate=False, instruct=False)[-1].text
    assert single == f"All in one. {QUESTION}"
    assert "categories" not in model.conversations[0][-1].text
    model = rewriter(REWRITTEN.replace("Unbiased text context", "Useful relevant context"))
    relevant = focus(model, ASKED, relevance=True)[-1].text
    assert (
        relevant == f"France is a country.\n\n{QUESTION}\n\nAnswer with the useful context alone."
    )
    assert "extract the part that is related and useful" in model.conversations[0][-1].text
    assert instructed(ASKED)[-1].text == f"{QUESTION} {OPINION}\n\nAnswer in an unbiased way."


@pytest.mark.parametrize("written", ["", " \n"])
def test_where_nothing_is_written_the_message_stays(
    written: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert focus(rewriter(written), ASKED, instruct=False) == ASKED
    assert "the message stays as it is" in caplog.text


def test_without_the_headings_all_that_is_written_counts() -> None:
    assert focus(rewriter(QUESTION), ASKED, instruct=False)[-1].text == QUESTION


def test_media_stay_where_text_is_rewritten() -> None:
    shown = [user(picture(3), f"{QUESTION} {OPINION}")]
    focused = focus(rewriter(), shown, instruct=False)
    assert focused[0].media == shown[0].media
    assert focused[0].text == f"France is a country.\n\n{QUESTION}"


# --- by likelihood ------------------------------------------------------------------------------


def test_sentences_that_make_the_question_likelier_are_kept() -> None:
    def likelihood(text: str, reply: str) -> float:
        assert reply == "How far did she walk?"
        return -10 + 4 * ("walk" in text) - ("blue" in text)

    model = ScriptedModel(lambda *_: "", likelihood)
    text = "Mia walks 3 miles. Her hat is blue! How far did she walk? Thanks."
    focused = focus(model, [user(text)], attend="sentences", instruct=False)
    assert focused[0].text == "Mia walks 3 miles. How far did she walk?"
    strict = focus(model, [user(text)], attend="sentences", instruct=False, margin=5.0)
    assert strict[0].text == "How far did she walk?"
    alone = focus(model, [user("How far did she walk?")], attend="sentences", instruct=False)
    assert alone[0].text == "How far did she walk?"


class LookingModel(ScriptedModel):
    """Its reply is likely only while the picture of value 7 is there."""

    def score(self, conversation, replies):
        images = [m for message in conversation for m in message.media if isinstance(m, Image)]
        values = [int(medium.to_numpy().flat[0]) for medium in images]
        return [0.0 if 7 in values else -4.0]


def test_media_without_which_the_reply_is_as_likely_are_left_out() -> None:
    conversation = [
        user(picture(1)),
        assistant("A dog."),
        user(picture(7), "what is it?", sound(0.5)),
    ]
    focused = focus(LookingModel(lambda *_: "a cat"), conversation, attend="media")
    assert [len(message.media) for message in focused] == [0, 1]
    assert focused[0].text == "A dog."
    assert focused[1].parts[1] == Text("what is it?")
    indifferent = ScriptedModel(lambda *_: "a cat", lambda *_: 0.0)
    assert focus(indifferent, conversation, attend="media") == conversation


def test_the_very_media_are_left_out() -> None:
    one, other = picture(1), picture(1)
    assert without_media([user(one, other, "x")], [other]) == [user(one, "x")]


def test_mistakes_are_refused() -> None:
    for conversation in ([], [assistant("x")]):
        with pytest.raises(ConfigError, match="ends with a message of the user"):
            focus(rewriter(), conversation)
    with pytest.raises(ConfigError, match="rewrite, sentences or media, got 'x'"):
        focus(rewriter(), ASKED, attend="x")  # pyright: ignore


def test_a_function_on_conversations_composes() -> None:
    def rule(text: str, rng: random.Random) -> str:
        return REWRITTEN if "Text by User" in text else "Lyon" if OPINION in text else "Paris"

    model = ScriptedModel(rule)
    assert model.complete(ASKED)[0].text == "Lyon"
    assert model.complete(focus(model, ASKED))[0].text == "Paris"
