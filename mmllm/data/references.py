"""Which pictures of a conversation the next medium is conditioned on: one rule for training and
replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mmllm.conversation import Image, Medium, Message

ReferenceChoice = Literal["none", "auto", "all"]


def find_references(
    messages: Sequence[Message], choice: ReferenceChoice, most: int
) -> tuple[list[Medium], int]:
    """Find the references of the media of a reply.

    Args:
        messages: what stands in front of the reply.
        choice: `auto`: the pictures of the last message of the user, or else the newest one of the
            conversation; `all`: all of the conversation; `none`: no picture.
        most: how many the decoder takes; where there are more, the newest ones are taken.

    Returns:
        The references, in order, and how many were left out because there are more than `most`.
    """
    everything = _pictures(messages)
    if choice == "none" or not everything:
        return [], 0
    found = everything
    if choice == "auto":
        last = [message for message in messages if message.role == "user"][-1:]
        found = _pictures(last) or everything[-1:]
    return found[-most:], max(len(found) - most, 0)


def _pictures(messages: Sequence[Message]) -> list[Medium]:
    media = (medium for message in messages for medium in message.media)
    return [medium for medium in media if isinstance(medium, Image) and medium.has_data]
