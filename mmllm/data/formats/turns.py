"""Turns with placeholders `<image>`, `<audio>`, `<video>`, converted to messages with media."""

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
"""Name of a speaker in dataset files -> role in a conversation."""

PLACEHOLDER = re.compile(rf"<({'|'.join(MEDIA)})>")

Queues: TypeAlias = Mapping[str, deque[Medium]]
"""Modality -> the media of its placeholders, in order."""


def as_list(value: Any) -> list[Any]:
    """Return the values of a field that holds nothing, one value, or a list."""
    if is_nothing(value) or value == "":
        return []
    return value if isinstance(value, list) else [value]


def queues(media: Iterable[Medium]) -> Queues:
    """Group media by modality, in the order of their placeholders."""
    found: Queues = {modality: deque() for modality in MEDIA}
    for entry in media:
        found[entry.modality].append(entry)
    return found


def role_of(turn: Mapping[str, Any]) -> Role:
    """Return the role in `from` or `role` of a turn. Raises RowError for an unknown speaker."""
    if not isinstance(turn, Mapping):
        raise RowError(f"expected a turn {{from, value}} or {{role, content}}, got {quoted(turn)}")
    speaker = turn.get("from") or turn.get("role")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise RowError(f"unknown speaker {quoted(speaker)}; known are {', '.join(ROLES)}")
    return ROLES[speaker]


def place(text: str, media: Queues) -> list[Text | Medium]:
    """Replace each placeholder in a text by the next medium of its modality.

    White space around a placeholder is removed.

    Args:
        text: the text of a turn.
        media: the media of the row; those that are used are removed.

    Returns:
        The parts of the turn.

    Raises:
        PlaceholderError: a placeholder has no medium.
    """
    pieces = PLACEHOLDER.split(text)  # text, modality, text, modality, …, text
    parts: list[Text | Medium] = []
    for modality in pieces[1::2]:
        if not media[modality]:
            raise PlaceholderError(f"<{modality}> stands in the text, but there is no {modality}")
        parts.append(media[modality].popleft())
    return woven(pieces[::2], parts)


def woven(texts: Sequence[str], between: Sequence[Text | Medium | None]) -> list[Text | Medium]:
    """Interleave texts with the parts between them.

    Args:
        texts: n + 1 texts; white space next to a part is removed, and so are empty texts.
        between: n parts; None for no part.
    """
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
    """Convert turns `{from, value}` with placeholders to messages.

    Args:
        turns: the turns of a row.
        given: media for the placeholders of users.
        made: media for the placeholders of the assistant; may be the same object as `given`.

    Raises:
        RowError: a turn is malformed.
        PlaceholderError: placeholders and media do not match.
    """
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
    """Create a medium from a value of a `datasets` column.

    Args:
        modality: "image", "audio" or "video".
        value: `{bytes, path}`, Embedded bytes (mmllm.data.tables), or the name of a file below
            `root`.
        root: the root folder of the media.
        caption: the caption of the medium.

    Raises:
        RowError: a value of another type.
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
    """Return the media in the columns `image`, `images`, `audio` and so on of a row.

    Args:
        row: the fields; a column may hold one medium or a list, each a file name or embedded bytes
            as in `embedded`.
        root: the folder that file names are relative to and must stay in.

    Raises:
        RowError: a value is neither a file name nor embedded bytes.
        OutsideRootError: a file lies outside `root`.
    """
    return queues(
        embedded(modality, value, root, None)
        for modality in MEDIA
        for column in (modality, f"{modality}s")
        for value in as_list(row.get(column))
    )


def check_size(size: int, what: str) -> None:
    """Raise OversizedMediaError if a file exceeds `Limits.bytes`.

    Args:
        size: bytes of the file.
        what: the file's name in messages.
    """
    allowed = current_limits().bytes
    if size > allowed:
        raise OversizedMediaError(f"{what}: {size} bytes, more than the limit of {allowed}")
