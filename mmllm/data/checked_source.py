"""The border between rows and training: whatever a row holds, it is a conversation or a MediaError.

Readers say what they miss in their own words. What they did not think of, and what all of them
must not let pass, is caught here, so that a row costs itself and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from mmllm.conversation import Medium, Message, Role, Text
from mmllm.data.protocol import DataSource
from mmllm.data.rendering import Rendered, Renderer
from mmllm.data.text_fields import check_text
from mmllm.errors import (
    ConfigError,
    ContextError,
    EmptyCaptionError,
    LongRowError,
    MediaError,
    RowError,
    brief_reason,
    quoted,
)

_LONGEST_MESSAGE, _LONGEST_NAME = 1000, 120


class CheckedDataSource:
    """A dataset whose `conversation` gives what one can learn from or raises MediaError, of which
    RowError is one, with a message that can be shown; `name` always gives a short one."""

    def __init__(self, source: DataSource):
        self.source = source
        self.share = source.share

    def __len__(self) -> int:
        return len(self.source)

    def conversation(self, index: int, rng: np.random.Generator) -> list[Message]:
        """Conversation `index` of the dataset."""
        try:
            return checked(self.source.conversation(index, rng))
        except MediaError as error:
            message = _shown(str(error), _LONGEST_MESSAGE)
            if message == str(error):
                raise
            raise type(error)(message) from None
        except Exception as error:  # of any reader, for any row
            message = str(error)
            if not isinstance(error, ConfigError):  # one of ours says what is wrong
                message = f"it cannot be read as a conversation ({brief_reason(error)})"
            raise RowError(_shown(message, _LONGEST_MESSAGE)) from error

    def name(self, index: int) -> str:
        """What reports call the item: its name in the dataset, or its number."""
        try:
            name = self.source.name(index)
            return _shown(name if name.isprintable() else repr(name), _LONGEST_NAME) or str(index)
        except Exception:  # a row that is no row has no name
            return str(index)


def checked(conversation: Sequence[Message]) -> list[Message]:
    """The conversation itself if one can learn from it; raises RowError."""
    messages = list(conversation)
    for message in messages:
        if message.role not in get_args(Role):
            raise RowError(f"unknown role {quoted(message.role)}: {', '.join(get_args(Role))}")
        for part in message.parts:
            _check_part(part, message.role)
        if not message.media and not message.text.strip():
            raise RowError(f"a turn of {message.role!r} is empty")
    speakers = [message.role for message in messages if message.role != "system"]
    if "assistant" not in speakers:
        raise RowError("the assistant says nothing")
    if speakers[0] != "user":
        raise RowError("the assistant speaks first; a conversation begins with the user")
    return messages


def render(renderer: Renderer, messages: Sequence[Message], longest: int | None = None) -> Rendered:
    """Render a conversation of a dataset. Raises RowError for one that this model cannot read or
    make, or whose turns its template refuses; LongRowError for more than `longest` tokens."""
    try:
        rendered = renderer.render(messages)
    except (ConfigError, ContextError) as error:
        raise RowError(_shown(str(error), _LONGEST_MESSAGE)) from error
    check_length(rendered, longest)
    return rendered


def check_length(rendered: Rendered, longest: int | None) -> None:
    """Raises LongRowError for more than `longest` tokens."""
    if longest is not None and len(rendered) > longest:
        raise LongRowError(f"{len(rendered)} tokens, but stage.max_length is {longest}")


def _check_part(part: Text | Medium, role: str) -> None:
    if isinstance(part, Text):
        check_text(part.text, f"a text of {role!r}")
        return
    if not isinstance(part, Medium):
        raise RowError(f"expected texts and media in a turn of {role!r}, got {quoted(part)}")
    if part.caption is not None:
        check_text(part.caption, f"a caption of {role!r}")
    if role != "assistant" and not part.has_data:
        raise RowError(f"an {part.modality} that {role!r} shows has no file")
    if role == "assistant" and not (part.caption or "").strip():
        raise EmptyCaptionError(f"{part!r}: what the assistant makes needs a caption")


def _shown(text: str, longest: int) -> str:
    """A text that any terminal and file takes, cut to a length."""
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
