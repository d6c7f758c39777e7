"""Dialogues of any turns and media, as JSON lines: the data of stage 3.

A row is `{"messages": [{"role": "user", "content": [{"type": "text", "text": "…"},
{"type": "image", "file": "a.png", "caption": "…"}]}, …]}`; a content that is a string is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import Medium, Message, Text
from mmllm.data.sources import medium, read_rows, select
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class DialoguesConfig:
    """`where` keeps the rows whose fields have these values, e.g. `{task: [text->image]}`.

    either_order: a user's text that stands beside one medium comes before it half of the time,
    and behind it otherwise; people do both.
    """

    file: str
    root: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    either_order: bool = False
    share: float = 1.0


class Dialogues:
    """See DialoguesConfig; a row is one conversation."""

    def __init__(self, config: DialoguesConfig, where: str):
        rows, self.root = read_rows(config.file, config.root, where)
        self.rows = select(rows, dict(config.where), where)
        self.either_order = config.either_order
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        messages = parse_messages(self.rows[index]["messages"], self.root)
        if self.either_order:
            messages = [
                replace(message, parts=message.parts[::-1])
                if _one_medium_with_text(message) and rng.random() < 0.5
                else message
                for message in messages
            ]
        return messages

    def name(self, index: int) -> str:
        return str(self.rows[index].get("id", index))


def _one_medium_with_text(message: Message) -> bool:
    return (
        message.role == "user"
        and len(message.parts) == 2
        and sum(isinstance(part, Medium) for part in message.parts) == 1
    )


def build(config: DialoguesConfig, *, where: str) -> Dialogues:
    return Dialogues(config, where)


def parse_messages(messages: Sequence[Mapping[str, Any]], root: Path) -> list[Message]:
    """The `messages` of a row -> a conversation whose media lie under `root`."""
    conversation = []
    for entry in messages:
        content = entry["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts: list[Text | Medium] = [
            Text(part["text"])
            if part["type"] == "text"
            else medium(part["type"], part.get("file"), root, part.get("caption"))
            for part in content
        ]
        if entry["role"] not in ("system", "user", "assistant"):
            raise ConfigError(f"unknown role {entry['role']!r}: system, user or assistant")
        conversation.append(Message(entry["role"], tuple(parts)))
    return conversation
