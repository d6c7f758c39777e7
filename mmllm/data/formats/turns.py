"""Turns whose text holds `<image>`, `<audio>` or `<video>` -> messages with media there."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mmllm.conversation import MEDIA, Medium, Message, Role, Text
from mmllm.data.sources import medium
from mmllm.data.text_fields import is_nothing
from mmllm.errors import OversizedMediaError, PlaceholderError, RowError, quoted
from mmllm.media import Embedded, current_limits

ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "developer": "system",
}
"""What speakers are called in files -> in a conversation."""

PLACEHOLDER = re.compile(rf"<({'|'.join(MEDIA)})>")

Queues: TypeAlias = Mapping[str, deque[Medium]]
"""Modality -> the media that its placeholders stand for, in order."""


def as_list(value: Any) -> list[Any]:
    """A field that holds nothing, one thing, or several."""
    if is_nothing(value) or value == "":
        return []
    return value if isinstance(value, list) else [value]


def queues(media: Iterable[Medium]) -> Queues:
    """Media in the order of their placeholders."""
    found: Queues = {modality: deque() for modality in MEDIA}
    for entry in media:
        found[entry.modality].append(entry)
    return found


def role_of(turn: Mapping[str, Any]) -> Role:
    """Of `from` or `role`; raises RowError for an unknown one."""
    if not isinstance(turn, Mapping):
        raise RowError(f"expected a turn {{from, value}} or {{role, content}}, got {quoted(turn)}")
    speaker = turn.get("from") or turn.get("role")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise RowError(f"unknown speaker {quoted(speaker)}; known are {', '.join(ROLES)}")
    return ROLES[speaker]


def place(text: str, media: Queues) -> list[Text | Medium]:
    """The parts of one turn: each placeholder takes the next medium of its modality.

    White space around a placeholder belongs to it. Raises PlaceholderError.
    """
    pieces = PLACEHOLDER.split(text)  # text, modality, text, modality, …, text
    parts: list[Text | Medium] = []
    for modality in pieces[1::2]:
        if not media[modality]:
            raise PlaceholderError(f"<{modality}> stands in the text, but there is no {modality}")
        parts.append(media[modality].popleft())
    return woven(pieces[::2], parts)


def woven(texts: Sequence[str], between: Sequence[Text | Medium | None]) -> list[Text | Medium]:
    """Texts with what stands between them (None: nothing), and no white space around that."""
    parts: list[Text | Medium] = []
    last = len(texts) - 1
    for number, text in enumerate(texts):
        text = text.lstrip() if number else text
        text = text.rstrip() if number < last else text
        if text:
            parts.append(Text(text))
        if number < last and (part := between[number]) is not None:
            parts.append(part)
    return parts


def converse(turns: Any, given: Queues, made: Queues) -> list[Message]:
    """Turns `{from, value}` -> messages. What users show is taken from `given`, what the assistant
    makes from `made` (which may be the same). Raises RowError."""
    messages = []
    for turn in as_list(turns):
        role, text = role_of(turn), turn.get("value")
        if not isinstance(text, str):
            raise RowError(f"a turn of {role!r} has no text, but {quoted(text)}")
        messages.append(Message(role, tuple(place(text, made if role == "assistant" else given))))
    for media in {id(given): given, id(made): made}.values():
        for modality, left in media.items():
            if left:
                raise PlaceholderError(
                    f"{len(left)} {modality} without a <{modality}> in the text, first {left[0]!r}"
                )
    return messages


def embedded(modality: str, value: Any, root: Path, caption: str | None) -> Medium:
    """A medium as `datasets` keeps it: `{bytes, path}`, bytes, or the name of a file below `root`.

    The bytes of a Parquet file are Embedded, see mmllm.data.tables. Raises RowError for anything
    else.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Embedded):
        return MEDIA[modality](source=value, caption=caption)
    if not isinstance(value, str):
        raise RowError(
            f"expected a file's name or {{bytes, path}} of {modality}, got {quoted(value)}"
        )
    return medium(modality, value, root, caption)


def columns(row: Mapping[str, Any], root: Path) -> Queues:
    """The media of a row in its columns `image`, `images` and so on; see `embedded`."""
    return queues(
        embedded(modality, value, root, None)
        for modality in MEDIA
        for column in (modality, f"{modality}s")
        for value in as_list(row.get(column))
    )


def check_size(size: int, what: str) -> None:
    """Raises OversizedMediaError for more bytes than a medium may have."""
    allowed = current_limits().bytes
    if size > allowed:
        raise OversizedMediaError(f"{what}: {size} bytes, more than the limit of {allowed}")
