"""Test items, and how they are put to a model.

A row of tests.jsonl is `{"id", "row", "messages", "expect"}`, or `{"caption"}` in the place of
messages for a decoder alone. An assistant turn with `"generate": true` is answered by the model
itself before the conversation goes on.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmllm.conversation import MEDIA, Conversation, Medium, Message
from mmllm.data.dialogues import parse_messages
from mmllm.data.sources import read_rows
from mmllm.data.turns import as_list
from mmllm.data.words import caption_of
from mmllm.errors import ConfigError, RowError, quoted
from mmllm.model import AnyToAny

MAX_NEW_TOKENS = 40

_BLANK = {
    "image": np.zeros((64, 64, 3), np.uint8),
    "video": np.zeros((2, 64, 64, 3), np.uint8),
    "audio": np.zeros((1, 1600), np.float32),
}


class Asked(Protocol):
    """What is asked of a chat: `mmllm.chat.Chat.reply_many`."""

    def reply_many(
        self, conversations: Sequence[Conversation], *, seeds: Sequence[int], **options: Any
    ) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Question:
    """One test item. `turns`: conversations' pieces, the model answers after each but the last."""

    id: str
    row: str
    turns: tuple[tuple[Message, ...], ...] = ()
    caption: str = ""
    expect: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Fixed for all times: the same item, the same noise."""
        return zlib.crc32(self.id.encode())

    @property
    def concept(self) -> str:
        return self.expect.get("concept", "")

    @property
    def modalities(self) -> list[str]:
        """Of the media that the last reply must hold, in order."""
        return list(self.expect["modalities"])

    @property
    def concepts(self) -> list[str]:
        """What each of those media must show."""
        return list(self.expect.get("concepts", [self.concept] * len(self.modalities)))


@dataclass(frozen=True)
class Answer:
    """What the model said: the whole conversation, its reply last."""

    question: Question
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        return self.messages[-1].text

    @property
    def media(self) -> list[Medium]:
        return self.messages[-1].media


def read_questions(file: Path) -> dict[str, list[Question]]:
    """All test items by row. Raises ConfigError for one that is none: each counts in a figure."""
    found: dict[str, list[Question]] = {}
    items, folder = read_rows(str(file), None, "evaluation")
    for number in range(len(items)):
        try:
            question = _question(items[number], folder)
        except RowError as error:
            raise ConfigError(f"{file}: test item {number}: {error}") from error
        found.setdefault(question.row, []).append(question)
    return found


def _question(item: Mapping[str, Any], folder: Path) -> Question:
    for key, kind in (("id", str), ("row", str), ("expect", Mapping)):
        if not isinstance(item.get(key), kind):
            raise RowError(f"expected {key!r}, a {kind.__name__}, got {quoted(item.get(key))}")
    turns: list[list[Any]] = [[]]
    for message in as_list(item.get("messages")):
        if isinstance(message, Mapping) and message.get("generate"):
            turns.append([])
        else:
            turns[-1].append(message)
    rng = np.random.default_rng(zlib.crc32(item["id"].encode("utf-8", "replace")))
    return Question(
        id=item["id"],
        row=item["row"],
        turns=tuple(tuple(parse_messages(turn, folder, rng)) for turn in turns),
        caption=caption_of(item.get("caption"), rng),
        expect=item["expect"],
    )


def spread(questions: Sequence[Question], num: int) -> list[Question]:
    """`num` questions that lie even in the list (all, if there are no more)."""
    if len(questions) <= num:
        return list(questions)
    places = np.linspace(0, len(questions) - 1, num).round().astype(int)
    return [questions[place] for place in places]


def ask(
    chat: Asked,
    questions: Sequence[Question],
    *,
    batch: int = 16,
    tick: Callable[[int], object] = lambda _: None,
) -> list[Answer]:
    """Put the questions to the model in batches. Seeds are fixed per item and turn."""
    answers = []
    for start in range(0, len(questions), batch):
        group = questions[start : start + batch]
        talks: list[tuple[Message, ...]] = [() for _ in group]
        for turn in range(max(len(question.turns) for question in group)):
            going = [place for place, q in enumerate(group) if turn < len(q.turns)]
            for place in going:
                talks[place] += group[place].turns[turn]
            replies = chat.reply_many(
                [talks[place] for place in going],
                seeds=[(group[place].seed + turn) % 2**31 for place in going],
                max_new_tokens=MAX_NEW_TOKENS,
            )
            for place, reply in zip(going, replies, strict=True):
                talks[place] += (reply.message,)
        answers += [Answer(q, talk) for q, talk in zip(group, talks, strict=True)]
        tick(len(group))
    return answers


@contextlib.contextmanager
def no_captions(model: AnyToAny) -> Iterator[None]:
    """While this lasts no caption reaches a decoder: `encode_captions` raises, and so do the
    pipeline's text encoders themselves. The unconditional condition is computed before."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a caption reached a decoder: only signal tokens may cross")

    hooks = []
    for decoder in model.decoders.values():
        decoder.unconditional(1)
        decoder.encode_captions = refuse  # pyright: ignore[reportAttributeAccessIssue]
        for name, part in decoder.pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                hooks.append(part.register_forward_pre_hook(refuse))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for decoder in model.decoders.values():
            del decoder.encode_captions


@contextlib.contextmanager
def muted(model: AnyToAny) -> Iterator[None]:
    """While this lasts decoders make blank media at once: for rows that look at no medium."""

    def blank(modality: str) -> Callable[..., list[Medium]]:
        fields: dict[str, Any] = {"sample_rate": 16_000} if modality == "audio" else {}
        medium = MEDIA[modality](array=_BLANK[modality], **fields)
        return lambda _condition, *, generators, **_: [medium] * len(generators)

    for decoder in model.decoders.values():
        decoder.sample = blank(decoder.modality)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for decoder in model.decoders.values():
            del decoder.sample
