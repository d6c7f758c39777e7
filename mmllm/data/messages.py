"""Chat messages as `datasets`, TRL and OpenAI write them, in .json, .jsonl or Parquet.

A content is a text, or a list of parts: `{type: text, text}`, `{type: image}` that takes the next
of the row's column `images`, `{type: image, image: file or {bytes, path}}`,
`{type: image_url, image_url: {url}}`, `{type: input_audio, input_audio: {data, format}}`; the same
for audio and video. A `url` is a file below the root or `data:…;base64,…`; nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import MEDIA, Medium, Message, Text
from mmllm.data.sources import open_rows, select
from mmllm.data.turns import (
    Queues,
    as_list,
    check_size,
    checked,
    columns,
    embedded,
    place,
    role_of,
)
from mmllm.errors import PlaceholderError, RowError


@dataclass(frozen=True)
class MessagesConfig:
    """`column` holds the messages; `root` is the folder of the media (the file's, unless given).

    What the assistant makes needs a `caption` in its part. `where` keeps the rows whose fields
    have these values.
    """

    file: str
    root: str | None = None
    column: str = "messages"
    where: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


class Messages:
    """See MessagesConfig; a row is one conversation."""

    def __init__(self, config: MessagesConfig, where: str):
        rows, self.root = open_rows(config.file, config.root, where)
        self.rows = select(rows, config.where, where)
        self.column = config.column
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        row = self.rows[index]
        messages = row.get(self.column)
        if not isinstance(messages, list):
            raise RowError(f"no list {self.column!r} in a row with fields {', '.join(row)}")
        media = columns(row, self.root)
        has_columns = any(media.values())
        conversation = []
        for message in messages:
            role, content = role_of(message), message.get("content")
            if isinstance(content, str):
                parts = place(content, media) if has_columns else [Text(content)] * bool(content)
            else:
                parts = [self._part(part, media) for part in as_list(content)]
            conversation.append(Message(role, tuple(parts)))
        for modality, left in media.items():
            if left:
                raise PlaceholderError(f"{len(left)} {modality} that no message shows")
        return checked(conversation)

    def name(self, index: int) -> str:
        return str(self.rows[index].get("id") or index)

    def _part(self, part: Mapping[str, Any], media: Queues) -> Text | Medium:
        kind = str(part.get("type") if isinstance(part, Mapping) else part)
        modality = kind.removeprefix("input_").removeprefix("output_").removesuffix("_url")
        if modality == "text":
            return Text(str(part.get("text") or ""))
        if modality not in MEDIA:
            raise RowError(f"unknown part {kind!r}: text, {', '.join(MEDIA)}")
        caption = part.get("caption")
        for key in (kind, modality, "url", "file", "path", "bytes"):
            if part.get(key) is not None:
                return source_of(modality, part[key], self.root, caption)
        if not media[modality]:
            raise PlaceholderError(f"a part {kind!r} has no {modality}, and the row none left")
        found = media[modality].popleft()
        return MEDIA[modality](source=found.source, caption=caption)


def source_of(modality: str, value: Any, root: Path, caption: str | None) -> Medium:
    """A medium as a message names it; see the top of this file. Raises MediaError."""
    if isinstance(value, Mapping):
        if isinstance(value.get("data"), str):
            return _from_base64(modality, value["data"], caption)
        value = value.get("url") or value
    if isinstance(value, str) and value.startswith("data:"):
        head, comma, data = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RowError(f"expected data:…;base64,… of {modality}, got {value[:40]!r}")
        return _from_base64(modality, data, caption)
    if isinstance(value, str):
        value = value.removeprefix("file://")
    return embedded(modality, value, root, caption)


def _from_base64(modality: str, data: str, caption: str | None) -> Medium:
    check_size(len(data) // 4 * 3, modality)
    try:
        return MEDIA[modality](source=base64.b64decode(data, validate=True), caption=caption)
    except binascii.Error as error:
        raise RowError(f"{modality}: not valid base64: {error}") from error


def build(config: MessagesConfig, *, where: str) -> Messages:
    return Messages(config, where)
