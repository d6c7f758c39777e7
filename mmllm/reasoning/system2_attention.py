"""System 2 Attention: a conversation without what should not count (Weston and Sukhbaatar 2023,
arXiv:2311.11829). The prompts are the paper's.

`focus` is a function on conversations: `chat.reply(focus(chat, conversation))`. What is left out is
decided by the model, in one of three ways:

- rewrite: the paper's; the model writes the last message again without opinions or, with
  `relevance`, without what is irrelevant;
- sentences: those sentences are kept that make the question likelier;
- media: those images, audios and videos are kept without which the model's reply is less likely.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Literal

from mmllm.conversation import ContentPart, Medium, Message, Text, user
from mmllm.errors import ConfigError, quoted
from mmllm.reasoning.models import ChatModel

logger = logging.getLogger(__name__)

Attend = Literal["rewrite", "sentences", "media"]

_UNBIASED = (
    "Given the following text by a user, extract the part that is unbiased and not their opinion, "
    "so that using that text alone would be good context for providing an unbiased answer to the "
    "question portion of the text. Please include the actual question or query that the user is "
    "asking."
)
_RELEVANT = (
    "Given the following text by a user, extract the part that is related and useful, so that "
    "using that text alone would be good context for providing an accurate and correct answer to "
    "the question portion of the text. Please include the actual question or query that the user "
    "is asking."
)
_CONTEXT = "Unbiased text context (includes all content except user's bias):"
_RELEVANT_CONTEXT = "Useful relevant context:"
_QUESTION = "Question/Query (does not include user bias/preference):"
_INSTRUCTION = "Answer in an unbiased way."
_RELEVANT_INSTRUCTION = "Answer with the useful context alone."
_HEADINGS = re.compile(
    r"(?:unbiased text context|useful relevant context)[^:\n]*:\s*(.*?)\s*"
    r"question\s*/\s*query[^:\n]*:\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*\s*")


def focus(
    model: ChatModel,
    conversation: Sequence[Message],
    *,
    attend: Attend = "rewrite",
    separate: bool = True,
    keep_original: bool = False,
    instruct: bool = True,
    relevance: bool = False,
    margin: float = 0.0,
    max_new_tokens: int = 512,
) -> list[Message]:
    """The conversation with its last message reduced to what should count.

    Args:
        model: decides what counts.
        conversation: it ends with a message of the user.
        attend: how it decides.
        separate: rewrite: context and question under headings of their own (the paper's default;
            without it, S2A-Single).
        keep_original: also keep the original message, before the reduced one (S2A-KeepOrig).
        instruct: add the instruction to answer without bias (without it, S2A-NI).
        relevance: rewrite by relevance instead of bias.
        margin: sentences, media: by how much log p must change for a part to be kept.
        max_new_tokens: of what the model writes.

    Returns:
        The conversation to reply to. Where the model wrote nothing, the message stays as it is.

    Raises:
        ConfigError: the last message is not the user's, `attend` is unknown, or the model gives no
            likelihoods where they are needed.
        CallError, BudgetError: as the model raises them.
    """
    if not conversation or conversation[-1].role != "user":
        raise ConfigError("focus: expected a conversation that ends with a message of the user")
    *before, last = conversation
    if attend == "rewrite":
        kept = _rewritten(model, before, last, separate, relevance, max_new_tokens)
    elif attend == "sentences":
        kept = _likely_sentences(model, last, margin)
    elif attend == "media":
        return _likely_media(model, conversation, margin, max_new_tokens)
    else:
        raise ConfigError(f"attend: expected rewrite, sentences or media, got {quoted(attend)}")
    parts: list[ContentPart] = [*last.parts, Text("\n\n")] if keep_original else []
    parts += kept
    if instruct:
        parts.append(Text(f"\n\n{_RELEVANT_INSTRUCTION if relevance else _INSTRUCTION}"))
    return [*before, Message("user", _joined(parts))]


def instructed(conversation: Sequence[Message]) -> list[Message]:
    """The conversation with the instruction alone: the paper's baseline."""
    *before, last = conversation
    return [*before, Message("user", _joined([*last.parts, Text(f"\n\n{_INSTRUCTION}")]))]


def rewriting_prompt(text: str, *, separate: bool = True, relevance: bool = False) -> str:
    """The paper's prompt that asks for the part of a text that should count.

    Args:
        text: the text.
        separate: ask for context and question under headings of their own.
        relevance: ask for what is relevant instead of what is unbiased.
    """
    prompt = _RELEVANT if relevance else _UNBIASED
    if separate:
        context = _RELEVANT_CONTEXT if relevance else _CONTEXT
        prompt += f' Separate this into two categories labeled with "{context}" and "{_QUESTION}".'
    return f"{prompt}\n\nText by User: {text}"


def _rewritten(
    model: ChatModel,
    before: Sequence[Message],
    last: Message,
    separate: bool,
    relevance: bool,
    max_new_tokens: int,
) -> list[ContentPart]:
    """The media of the message, and its text as the model writes it again."""
    prompt = rewriting_prompt(last.text, separate=separate, relevance=relevance)
    (completion,) = model.complete(
        [*before, user(prompt)], temperature=0.0, max_new_tokens=max_new_tokens
    )
    text = completion.text.strip()
    if separate and (found := _HEADINGS.search(text)):
        text = "\n\n".join(part.strip() for part in found.groups() if part.strip())
    if not text:
        logger.warning("focus: the model wrote nothing; the message stays as it is")
        return list(last.parts)
    return [*last.media, Text(text)]


def _likely_sentences(model: ChatModel, last: Message, margin: float) -> list[ContentPart]:
    """The media, the question (the last sentence with a question mark, or the last one), and the
    sentences given which it is likelier than without, by more than `margin`."""
    sentences = [entry for entry in _SENTENCE.findall(last.text) if entry.strip()]
    if len(sentences) < 2:
        return list(last.parts)
    questions = [index for index, entry in enumerate(sentences) if "?" in entry]
    question = questions[-1] if questions else len(sentences) - 1
    asked = [sentences[question].strip()]
    (alone,) = model.score([user(_ASK.format(text=""))], asked)
    kept = [
        sentence
        for index, sentence in enumerate(sentences)
        if index == question
        or model.score([user(_ASK.format(text=sentence.strip()))], asked)[0] - alone > margin
    ]
    return [*last.media, Text("".join(kept).strip())]


_ASK = "{text}\n\nWrite a question."


def _likely_media(
    model: ChatModel, conversation: Sequence[Message], margin: float, max_new_tokens: int
) -> list[Message]:
    """The conversation without the media whose loss leaves the model's reply as likely as it was.
    If none matters, all are kept."""
    media = [medium for message in conversation for medium in message.media]
    if len(media) < 2:
        return list(conversation)
    (completion,) = model.complete(conversation, temperature=0.0, max_new_tokens=max_new_tokens)
    (whole,) = model.score(conversation, [completion.text])
    dropped = [
        medium
        for medium in media
        if whole - model.score(without_media(conversation, [medium]), [completion.text])[0]
        <= margin
    ]
    return without_media(conversation, dropped if len(dropped) < len(media) else [])


def without_media(conversation: Sequence[Message], media: Sequence[Medium]) -> list[Message]:
    """The conversation without some media; messages that held nothing else are left out.

    Args:
        conversation: the messages.
        media: the very objects that are left out.
    """
    dropped = set(map(id, media))
    messages = [
        message.with_parts([part for part in message.parts if id(part) not in dropped])
        for message in conversation
    ]
    return [
        message
        for message, original in zip(messages, conversation, strict=True)
        if message.parts or not original.parts
    ]


def _joined(parts: Sequence[ContentPart]) -> tuple[ContentPart, ...]:
    """Parts with neighbouring texts put together."""
    joined: list[ContentPart] = []
    for part in parts:
        if joined and isinstance(part, Text) and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + part.text)
        else:
            joined.append(part)
    return tuple(joined)
