"""Which pictures of a conversation the next medium is conditioned on: one rule for training and
replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mmllm.conversation import Image, Medium, Message

if TYPE_CHECKING:
    from mmllm.data.rendering import MediaSpan

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


@dataclass(frozen=True)
class ReferenceRules:
    """Which pictures condition the media of the replies in a conversation.

    Attributes:
        by_key: key of a decoder that takes references -> its choice, and how many it takes.
    """

    by_key: Mapping[str, tuple[ReferenceChoice, int]] = field(
        default_factory=dict[str, tuple[ReferenceChoice, int]]
    )

    @classmethod
    def of(cls, decoders: Mapping[str, Any]) -> ReferenceRules:
        """Return the rules of a system. Media that start from one of the conversation have none.

        Args:
            decoders: key -> `ModalityDecoder`.
        """
        return cls(
            {
                key: (decoder.config.references, decoder.max_references)
                for key, decoder in decoders.items()
                if decoder.max_references
                and decoder.config.references != "none"
                and getattr(decoder.config, "init_media", "none") == "none"
            }
        )

    def apply(self, outputs: list[MediaSpan], messages: Sequence[Message]) -> list[MediaSpan]:
        """Add to each output medium its references, which stand in front of its reply.

        Args:
            outputs: of all replies, in order.
            messages: the conversation.

        Returns:
            The outputs.
        """
        if not self.by_key:
            return outputs
        spans = iter(outputs)
        with_references: list[MediaSpan] = []
        for number, message in enumerate(messages):
            for _ in message.media if message.role == "assistant" else ():
                span = next(spans)
                if span.key in self.by_key:
                    choice, most = self.by_key[span.key]
                    found, _ = find_references(messages[:number], choice, most)
                    span = replace(span, references=tuple(found))
                with_references.append(span)
        return with_references


def _pictures(messages: Sequence[Message]) -> list[Medium]:
    media = (medium for message in messages for medium in message.media)
    return [medium for medium in media if isinstance(medium, Image) and medium.has_data]
