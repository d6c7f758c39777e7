"""Conversations as plain data: messages of text and media, in order.

Nothing here imports torch, and no file is opened before its pixels or samples are asked for.
"""

# Values of users are checked at run time, whatever the annotation.
# pyright: reportUnnecessaryIsInstance=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from mmllm.media.medium import Medium
from mmllm.media.types import MEDIA, Audio, Image, SampledVideo, Video

__all__ = [
    "MEDIA",
    "Audio",
    "ContentPart",
    "Conversation",
    "Image",
    "Medium",
    "Message",
    "Role",
    "SampledVideo",
    "Text",
    "Video",
    "assistant",
    "message",
    "system",
    "user",
]

Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    """A run of text. It is never parsed: a special token spelt in it stays text."""

    text: str


ContentPart: TypeAlias = Text | Medium


@dataclass(frozen=True)
class Message:
    """One turn of a speaker.

    Attributes:
        role: user, assistant or system.
        parts: texts and media, in order.
    """

    role: Role
    parts: tuple[ContentPart, ...] = field(default=())

    @property
    def text(self) -> str:
        """The text without the media; a space stands where a medium alone parted it."""
        text, is_parted = "", False
        for part in self.parts:
            if isinstance(part, Text):
                text += spaced(text, part.text) if is_parted else part.text
            is_parted = not isinstance(part, Text)
        return text

    @property
    def media(self) -> list[Medium]:
        """The media, in order."""
        return [part for part in self.parts if isinstance(part, Medium)]

    def with_parts(self, parts: Sequence[ContentPart]) -> Message:
        """Return the same message with other parts."""
        return replace(self, parts=tuple(parts))


Conversation: TypeAlias = Sequence[Message]


def spaced(before: str, after: str) -> str:
    """`after` as it reads behind `before`: with a space, where a medium alone stood between them.

    Args:
        before: text that ends where the other begins.
        after: the other text.
    """
    has_space = before[-1:].isspace() or after[:1].isspace()
    return f" {after}" if before and after and not has_space else after


def message(role: Role, *parts: str | ContentPart) -> Message:
    """Return a message.

    Args:
        role: user, assistant or system.
        *parts: texts and media, in order; a str becomes a Text.

    Raises:
        TypeError: a part of another type.
    """
    typed: list[ContentPart] = []
    for part in parts:
        if isinstance(part, str):
            typed.append(Text(part))
        elif isinstance(part, Text | Medium):
            typed.append(part)
        else:
            raise TypeError(
                f"{role}(...): expected str, Text, Image, Audio or Video, got {type(part).__name__}"
            )
    return Message(role, tuple(typed))


def system(*parts: str | ContentPart) -> Message:
    """`system("Answer in one word.")`."""
    return message("system", *parts)


def user(*parts: str | ContentPart) -> Message:
    """`user("What is this?", Image("cat.png"))`."""
    return message("user", *parts)


def assistant(*parts: str | ContentPart) -> Message:
    """`assistant("Here it is: ", Image("apple.png"))`."""
    return message("assistant", *parts)
