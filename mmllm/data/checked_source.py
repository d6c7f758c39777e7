"""Validation of dataset rows: whatever a row holds, reading it gives a conversation or MediaError.

Each reader raises errors about its own format. Unexpected exceptions of readers, and conversations
that no reader may return, are converted to RowError here, so that training skips the bad row and
continues.
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
    """A dataset whose rows are validated.

    `conversation` returns a valid conversation or raises MediaError (RowError is a subclass) with a
    short printable message; `name` never raises.

    Args:
        source: the dataset.
    """

    def __init__(self, source: DataSource):
        self.source = source
        self.share = source.share

    def __len__(self) -> int:
        return len(self.source)

    def conversation(self, index: int, rng: np.random.Generator) -> list[Message]:
        """Return conversation `index`.

        Args:
            index: from 0 to `len(self) - 1`.
            rng: draws what varies from epoch to epoch, such as the prompt.

        Raises:
            MediaError: the row is no valid conversation.
        """
        try:
            return checked(self.source.conversation(index, rng))
        except MediaError as error:
            message = _shown(str(error), _LONGEST_MESSAGE)
            if message == str(error):
                raise
            raise type(error)(message) from None
        except Exception as error:  # a reader may raise anything for an unexpected row
            message = str(error)
            if not isinstance(error, ConfigError):  # messages of mmllm are clear by themselves
                message = f"it cannot be read as a conversation ({brief_reason(error)})"
            raise RowError(_shown(message, _LONGEST_MESSAGE)) from error

    def name(self, index: int) -> str:
        """Return the name of a row for reports: its name in the dataset, or its number."""
        try:
            name = self.source.name(index)
            return _shown(name if name.isprintable() else repr(name), _LONGEST_NAME) or str(index)
        except Exception:  # a malformed row has no name
            return str(index)


def checked(conversation: Sequence[Message]) -> list[Message]:
    """Return a conversation unchanged if it is valid training data.

    Args:
        conversation: messages as a reader returns them.

    Raises:
        RowError: an unknown role, an empty turn, no turn of the assistant, a first turn that is not
            the user's, or a part that is neither text nor a medium with the data it needs.
    """
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
    """Render a conversation of a dataset.

    Args:
        renderer: that of the model.
        messages: the conversation.
        longest: maximum number of tokens; None for no limit.

    Raises:
        RowError: the model lacks an encoder or decoder for a medium, or its chat template rejects
            the roles.
        LongRowError: the conversation has more than `longest` tokens.
    """
    try:
        rendered = renderer.render(messages)
    except (ConfigError, ContextError) as error:
        raise RowError(_shown(str(error), _LONGEST_MESSAGE)) from error
    check_length(rendered, longest)
    return rendered


def check_length(rendered: Rendered, longest: int | None) -> None:
    """Raise LongRowError for a row that is too long.

    Args:
        rendered: the row's token ids, labels and media.
        longest: the maximum number of tokens, `stage.max_length`; None means no limit.
    """
    if longest is not None and len(rendered) > longest:
        raise LongRowError(f"{len(rendered)} tokens, but stage.max_length is {longest}")


def _check_part(part: Text | Medium, role: str) -> None:
    """Raise RowError for a part that a message of this role cannot have."""
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
    """Return a text cut to a length, with characters escaped that UTF-8 cannot encode."""
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
