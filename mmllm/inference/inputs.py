"""What people pass to a chat -> messages: strings, files, images of Pillow, arrays, OpenAI's dicts.

    as_messages("Draw a cat.")                                     one user message
    as_messages("What is this?", Path("cat.png"))                  with an image
    as_messages([{"role": "user", "content": "Draw a cat."}])      OpenAI's messages

The server and datasets do not use this module: their strings are text, never names of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import (
    MEDIA,
    ContentPart,
    Image,
    Medium,
    Message,
    Text,
    message,
)
from mmllm.errors import ConfigError, quoted
from mmllm.inference.options import modality_key
from mmllm.inference.replies import Reply

MEDIA_SUFFIXES = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic"), "Image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac", ".opus"), "Audio"),
    **dict.fromkeys((".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif"), "Video"),
}
"""Suffix of a media file -> the class of its likely content."""


def user(*parts: Any) -> Message:
    """A user message: `user("What is this?", Image("cat.png"))`.

    Args:
        parts: text, media, Paths of media files, images of Pillow (see `as_part`).

    Raises:
        ConfigError: for a part of another type, and for a str that is the name of an existing media
            file.
    """
    return Message("user", tuple(as_part(part) for part in parts))


def assistant(*parts: Any) -> Message:
    """A message of the model: `assistant("Here it is: ", Image("apple.png"))`; see `user`."""
    return Message("assistant", tuple(as_part(part) for part in parts))


def system(*parts: Any) -> Message:
    """A system message: `system("Answer in one word.")`; see `user`."""
    return Message("system", tuple(as_part(part) for part in parts))


def as_messages(
    given: Any,
    *more: Any,
    system: str | None = None,
    media_tokens: int | None = None,
    **media: Any,
) -> list[Message]:
    """The messages of one conversation, however it is written.

    Args:
        given: a list of messages (Message, Reply, OpenAI's dicts), one of them, or the first part
            of a user message (see `as_part`).
        more: more parts of the user message.
        system: the text of a system message, which is put first.
        media_tokens: how many tokens each medium may take at most that has no `max_tokens` of its
            own.
        media: by modality (image, images, …), media that are added to the last message: a file's
            name, what `as_part` takes, or a list of these.

    Raises:
        ConfigError: for anything else, with what is expected.
        MediaError: for a file that is not there.
    """
    messages = within_budget(_with_media(_messages(given, *more), media), media_tokens)
    return messages if system is None else with_system(messages, system)


def within_budget(messages: Sequence[Message], max_tokens: int | None) -> list[Message]:
    """The messages with a budget for every medium that has none.

    Args:
        messages: a conversation.
        max_tokens: of one medium; None changes nothing.

    Raises:
        MediaError: it is no whole number from 1.
    """
    if max_tokens is None:
        return list(messages)
    return [
        entry.with_parts(
            [
                replace(part, max_tokens=max_tokens)
                if isinstance(part, Medium) and part.max_tokens is None
                else part
                for part in entry.parts
            ]
        )
        for entry in messages
    ]


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with a system message before them.

    Args:
        messages: a conversation without a system message.
        text: what the system message says.

    Raises:
        ConfigError: if there is a system message already.
    """
    if any(entry.role == "system" for entry in messages):
        raise ConfigError("system: the conversation has a system message already")
    return [message("system", text), *messages]


def _with_media(messages: list[Message], media: Mapping[str, Any]) -> list[Message]:
    """The messages with media added to the last one, which has to be the user's."""
    parts = [
        _medium(modality_key(name), value, f"{name}=")
        for name, values in media.items()
        for value in (values if isinstance(values, list | tuple) else [values])
    ]
    if not parts:
        return messages
    last = messages[-1]
    if last.role != "user":
        raise ConfigError(f"{', '.join(media)}: expected a user message last, got {last.role!r}")
    return [*messages[:-1], last.with_parts([*last.parts, *parts])]


def _messages(given: Any, *more: Any) -> list[Message]:
    """The messages of `as_messages` before its keywords are added."""
    if not more:
        if isinstance(given, Message):
            return [given]
        if isinstance(given, Reply):
            return [given.message]
        if _is_message_dict(given):
            return [_from_dict(given)]
        if isinstance(given, Iterable) and not (
            isinstance(given, str | bytes | Mapping | np.ndarray) or hasattr(given, "read")
        ):
            entries = list(given)
            if not entries:
                raise ConfigError("the conversation is empty: give a message such as user('Hi')")
            if any(_is_message(entry) for entry in entries):
                return [_as_message(entry) for entry in entries]
            given, *more = entries  # pyright: ignore[reportAssignmentType]
    return [Message("user", tuple(as_part(part) for part in (given, *more)))]


def as_part(value: Any) -> ContentPart:
    """A part of a message.

    Args:
        value: Text or a str, a Medium, the Path or the bytes of a media file or the file open for
            reading, an image of Pillow, an array uint8[H, W, 3], or a part as OpenAI and
            transformers write them.

    Raises:
        ConfigError: for anything else, and for a str that is the name of an existing media file
            or the URL of one: it asks which is meant.
    """
    if isinstance(value, Text | Medium):
        return value
    if isinstance(value, str):
        _ask_about_file(value)
        return Text(value)
    if _is_pillow(value):
        return Image.from_pil(value)
    if hasattr(value, "read") and not isinstance(value, Path):
        value = value.read()
    if isinstance(value, Path | bytes):
        from mmllm import media

        return MEDIA[media.probe(value).modality](value)
    if isinstance(value, np.ndarray):
        return Image.from_numpy(value)
    if isinstance(value, Mapping) and isinstance(value.get("type"), str):
        return _part_from_dict(value)
    raise ConfigError(
        "expected text, a picture, a sound or a clip (str, Path, Image, Audio, Video, PIL.Image), "
        f"got {type(value).__name__} {quoted(value)}; a conversation is a list of messages such as "
        "user('…')"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Message | Reply) or _is_message_dict(value)


def _is_message_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _as_message(value: Any) -> Message:
    """A message in a list of messages; a bare str or medium is a user message."""
    if isinstance(value, Message):
        return value
    if isinstance(value, Reply):
        return value.message
    if _is_message_dict(value):
        return _from_dict(value)
    return Message("user", (as_part(value),))


def _from_dict(given: Mapping[str, Any]) -> Message:
    """A message as OpenAI writes it: `{role, content}`."""
    role = "system" if given["role"] == "developer" else given["role"]
    if role not in ("system", "user", "assistant"):
        raise ConfigError(f"role: expected system, user or assistant, got {quoted(role)}")
    content = given.get("content")
    if content is None or isinstance(content, Mapping):
        content = [] if content is None else [content]
    parts = [content] if isinstance(content, str) else list(content)
    return message(role, *(Text(p) if isinstance(p, str) else as_part(p) for p in parts))


def _part_from_dict(part: Mapping[str, Any]) -> ContentPart:
    """`{type: text, text}`, `{type: image_url, image_url: {url}}`, `{type: image, image: …}`,
    `{type: input_audio, input_audio: {data}}`, and so for every modality."""
    kind: str = part["type"]
    name = kind.removeprefix("input_").removeprefix("output_").removesuffix("_url")
    if name == "text":
        return Text(str(part.get("text", "")))
    modality = modality_key(name)
    if modality not in MEDIA:
        raise ConfigError(f"a part's type: expected text, {', '.join(MEDIA)}, got {quoted(kind)}")
    for key in (kind, name, f"{name}_url", "url", "path", "data", "file"):
        if part.get(key) is not None:
            return _medium(modality, part[key], f"a part {kind!r}")
    raise ConfigError(f"a part {kind!r} without {kind!r} or {name!r}, got {quoted(dict(part))}")


def _medium(modality: str, value: Any, where: str) -> Medium:
    """A medium from a data URI, a file, bytes, base64 in a mapping, or what `as_part` takes."""
    from mmllm.media import data_uri

    if isinstance(value, Mapping):
        if isinstance(value.get("data"), str) and not data_uri.is_data_uri(value["data"]):
            return MEDIA[modality](data_uri.decode(value["data"], where))
        keys = ("url", "data", "path", "bytes")
        inner = next((value[key] for key in keys if value.get(key)), None)
        return _medium(modality, inner, where)
    if isinstance(value, str) and data_uri.is_data_uri(value):
        return MEDIA[modality](data_uri.parse(value, where))
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ConfigError(f"{where}: nothing is fetched; download {quoted(value)}, give its path")
    if isinstance(value, str):
        return MEDIA[modality](value.removeprefix("file://"))
    if isinstance(value, Path | bytes):
        return MEDIA[modality](value)
    part = as_part(value)
    if isinstance(part, MEDIA[modality]):
        return part
    raise ConfigError(f"{where}: expected {MEDIA[modality].__name__}, got {quoted(value)}")


def _is_pillow(value: Any) -> bool:
    """Whether it is an image of Pillow, which is not imported to find out."""
    return any(
        cls.__module__ == "PIL.Image" and cls.__name__ == "Image" for cls in type(value).mro()
    )


def _ask_about_file(text: str) -> None:
    """Raise ConfigError for the name of an existing media file, and for the URL of one."""
    if len(text) > 1000 or "\n" in text:
        return
    is_url = text.startswith(("http://", "https://")) and " " not in text
    name = text.partition("?")[0] if is_url else text
    suffix = name[name.rfind(".") :].lower() if "." in name[-6:] else ""
    if suffix not in MEDIA_SUFFIXES:
        return
    if is_url:
        raise ConfigError(
            f"{text!r} is the URL of a file, and nothing is fetched: download it and write "
            f"{MEDIA_SUFFIXES[suffix]}(path), or Text({text!r}) for the words"
        )
    try:
        is_file = Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return
    if is_file:
        kind = MEDIA_SUFFIXES[suffix]
        raise ConfigError(
            f"{text!r} is the name of a file: write {kind}({text!r}) for what it holds, or "
            f"Text({text!r}) for the words"
        )
