"""Reader of chat messages in the format of OpenAI, `datasets` and TRL (.json, .jsonl or Parquet).

The content of a message is a text, or a list of parts: `{type: text, text}` (or `value`, or
`content`), `{type: image}` for the next medium of the row's column `images`,
`{type: image, image: file or {bytes, path}}`, `{type: image_url, image_url: {url}}`,
`{type: input_audio, input_audio: {data, format}}`; likewise for audio and video. A `url` is a file
below the root or `data:…;base64,…`; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import MEDIA, Medium, Message, Text
from mmllm.data.formats.turns import Queues, as_list, columns, embedded, place, role_of
from mmllm.data.sources import from_text, open_rows, require, select
from mmllm.data.text_fields import caption_of, is_nothing
from mmllm.errors import PlaceholderError, RowError, quoted
from mmllm.media import data_uri


@dataclass(frozen=True)
class OpenAIMessagesConfig:
    """Settings of a dataset of OpenAI messages. An output medium needs a `caption` in its part.

    Attributes:
        file: a .json, .jsonl or .parquet file.
        root: the folder of the media; the folder of the file by default.
        column: the column that holds the messages.
        where: keep only the rows whose fields have these values.
        share: weight of the dataset in the mixture.
    """

    file: str
    root: str | None = None
    column: str = "messages"
    where: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


class Messages:
    """A dataset of OpenAI messages, see OpenAIMessagesConfig; each row is one conversation."""

    def __init__(self, config: OpenAIMessagesConfig, where: str):
        rows, self.root = open_rows(config.file, config.root, where)
        require(rows, [config.column], where)
        self.rows = select(rows, config.where, where)
        self.column = config.column
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
        row = self.rows[index]
        messages = row.get(self.column)
        if not isinstance(messages, list):
            raise RowError(f"no list {self.column!r} in a row with fields {quoted(list(row))}")
        media = columns(row, self.root)
        has_columns = any(media.values())
        conversation = []
        for message in messages:
            role, content = role_of(message), message.get("content")
            if isinstance(content, str):
                parts = place(content, media) if has_columns else [Text(content)]
            else:
                parts = [self._part(part, media, rng) for part in as_list(content)]
            conversation.append(Message(role, tuple(parts)))
        for modality, left in media.items():
            if left:
                raise PlaceholderError(f"{len(left)} {modality} that no message shows")
        return conversation

    def name(self, index: int) -> str:
        """See DataSource."""
        return str(self.rows[index].get("id") or index)

    def _part(self, part: Any, media: Queues, rng: np.random.Generator) -> Text | Medium:
        """Convert one part of a message; `media` are those of the row's columns."""
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise RowError(f"expected a part {{type: text, text}} or of media, got {quoted(part)}")
        kind: str = part["type"]
        modality = kind.removeprefix("input_").removeprefix("output_").removesuffix("_url")
        if modality == "text":
            return Text(_words(part))
        if modality not in MEDIA:
            raise RowError(f"unknown part {quoted(kind)}: text, {', '.join(MEDIA)}")
        caption = caption_of(part.get("caption"), rng) or None
        for key in (kind, modality, "url", "file", "path", "bytes"):
            if not is_nothing(part.get(key)):
                return source_of(modality, part[key], self.root, caption)
        if not media[modality]:
            raise PlaceholderError(f"a part {kind!r} has no {modality}, and the row none left")
        found = media[modality].popleft()
        return MEDIA[modality](source=found.source, caption=caption)


def _words(part: Mapping[str, Any]) -> str:
    """Return the text of a text part, from any of its possible fields. Raises RowError."""
    for key in ("text", "value", "content"):
        if isinstance(part.get(key), str):
            return part[key]
    raise RowError(f"a text part has no text, but {quoted(part)}")


def source_of(modality: str, value: Any, root: Path, caption: str | None) -> Medium:
    """Create the medium of a part.

    Args:
        modality: "image", "audio" or "video".
        value: the content of the part, see the module docstring.
        root: the root folder of the media.
        caption: the caption of the medium.

    Raises:
        MediaError: the value names no medium, or one outside `root`.
    """
    if isinstance(value, Mapping):
        data = value.get("data")
        if isinstance(data, str):
            read = data_uri.parse if data_uri.is_data_uri(data) else data_uri.decode
            return MEDIA[modality](source=from_text(data, modality, read), caption=caption)
        value = value.get("url") or value
    if isinstance(value, str):
        value = value.removeprefix("file://")
    return embedded(modality, value, root, caption)


def build(config: OpenAIMessagesConfig, *, where: str) -> Messages:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return Messages(config, where)
