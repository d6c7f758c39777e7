"""Reader of dialogues with any turns and media, in JSON or JSONL: the data of stage 3.

A row is `{"messages": [{"role": "user", "content": [{"type": "text", "text": "…"},
{"type": "image", "file": "a.png", "caption": "…"}]}, …]}`; a string as `content` is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import Medium, Message, Text
from mmllm.data.formats.turns import role_of
from mmllm.data.sources import medium, read_rows, require, select
from mmllm.data.text_fields import caption_of
from mmllm.errors import RowError, quoted


@dataclass(frozen=True)
class DialoguesConfig:
    """Settings of a dataset of dialogues.

    Attributes:
        file: a .json or .jsonl file.
        root: the folder of the media; the folder of the file by default.
        where: keep only the rows whose fields have these values, e.g. `{task: [text->image]}`.
        either_order: whether to swap text and medium at random in user turns of one text and one
            medium, since users write both orders.
        share: weight of the dataset in the mixture.
    """

    file: str
    root: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    either_order: bool = False
    share: float = 1.0


class Dialogues:
    """A dataset of dialogues, see DialoguesConfig; each row is one conversation."""

    def __init__(self, config: DialoguesConfig, where: str):
        rows, self.root = read_rows(config.file, config.root, where)
        require(rows, ["messages"], where)
        self.rows = select(rows, dict(config.where), where)
        self.either_order = config.either_order
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
        messages = parse_messages(self.rows[index].get("messages"), self.root, rng)
        if self.either_order:
            messages = [
                replace(message, parts=message.parts[::-1])
                if _one_medium_with_text(message) and rng.random() < 0.5
                else message
                for message in messages
            ]
        return messages

    def name(self, index: int) -> str:
        """See DataSource."""
        return str(self.rows[index].get("id", index))


def _one_medium_with_text(message: Message) -> bool:
    return (
        message.role == "user"
        and len(message.parts) == 2
        and sum(isinstance(part, Medium) for part in message.parts) == 1
    )


def parse_messages(messages: Any, root: Path, rng: np.random.Generator) -> list[Message]:
    """Convert the `messages` of a row to a conversation.

    Args:
        messages: a list of `{role, content}`.
        root: the root folder of the media.
        rng: draws one of several captions of a medium.

    Raises:
        RowError: the messages are malformed.
        OutsideRootError: a file is outside `root`.
    """
    if not isinstance(messages, list):
        raise RowError(f"expected a list of `messages`, got {quoted(messages)}")
    conversation = []
    for entry in messages:
        role, content = role_of(entry), entry.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise RowError(
                f"a turn of {role!r}: expected a text or a list of parts, got {quoted(content)}"
            )
        conversation.append(Message(role, tuple(_part(part, root, rng) for part in content)))
    return conversation


def _part(part: Any, root: Path, rng: np.random.Generator) -> Text | Medium:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise RowError(f"expected a part {{type: text, text}} or of media, got {quoted(part)}")
    if part["type"] != "text":
        caption = caption_of(part.get("caption"), rng) or None
        return medium(part["type"], part.get("file"), root, caption)
    if not isinstance(part.get("text"), str):
        raise RowError(f"a text part has no text, but {quoted(part)}")
    return Text(part["text"])


def build(config: DialoguesConfig, *, where: str) -> Dialogues:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return Dialogues(config, where)
