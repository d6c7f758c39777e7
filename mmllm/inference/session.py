"""A conversation that keeps its turns.

chat = mmllm.load("mini").conversation()
chat.reply("Draw a red apple.").image.save("apple.png")
chat.reply("What did you draw?").text
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmllm.conversation import ContentPart, Message
from mmllm.inference.events import Done, Event
from mmllm.inference.inputs import as_messages, with_system
from mmllm.inference.options import pop_inputs
from mmllm.inference.replies import Reply

if TYPE_CHECKING:
    from mmllm.inference.chat import Chat


class ChatSession:
    """One conversation with a model.

    Attributes:
        messages: the turns, with the replies. A turn that fails or is cancelled leaves them as they
            were.
    """

    def __init__(self, chat: Chat, messages: Sequence[Message] = ()):
        self._chat = chat
        self.messages: list[Message] = list(messages)

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def __repr__(self) -> str:
        return f"ChatSession({len(self)} messages)"

    def reply(self, *parts: Any, **options: Any) -> Reply:
        """Add a turn, reply to it, and keep both.

        Args:
            *parts: the turn's texts and media, as in `Chat.reply`.
            **options: the options of `Chat.reply`.
        """
        messages = self._with_turn(parts, options)
        reply = self._chat.reply(messages, **options)
        self.messages = [*messages, reply.message]
        return reply

    __call__ = reply

    async def areply(self, *parts: Any, **options: Any) -> Reply:
        """Reply like `reply`, for asyncio.

        Args:
            *parts: the turn's texts and media, as in `Chat.reply`.
            **options: the options of `Chat.reply`.
        """
        messages = self._with_turn(parts, options)
        reply = await self._chat.areply(messages, **options)
        self.messages = [*messages, reply.message]
        return reply

    def stream(self, *parts: Any, **options: Any) -> Iterator[Event]:
        """Add a turn and yield the events of the reply, as `Chat.stream` does.

        The turn is kept once the last event, Done, has come.

        Args:
            *parts: the turn's texts and media, as in `Chat.reply`.
            **options: the options of `Chat.stream`.
        """
        messages = self._with_turn(parts, options)
        for event in self._chat.stream(messages, **options):
            if isinstance(event, Done):
                self.messages = [*messages, event.reply.message]
            yield event

    def _with_turn(self, parts: Sequence[Any], options: dict[str, Any]) -> list[Message]:
        """The messages with a turn; parts that are keywords are taken out of `options`."""
        inputs = pop_inputs(options)
        system = inputs.pop("system", None)
        messages = [*self.messages, *as_messages(*parts, **inputs)]
        return messages if system is None else with_system(messages, system)

    def undo(self) -> list[Message]:
        """Remove the last message of the user and all after it; returns them."""
        turns = [index for index, entry in enumerate(self.messages) if entry.role == "user"]
        start = turns[-1] if turns else len(self.messages)
        self.messages, removed = self.messages[:start], self.messages[start:]
        return removed

    def clear(self) -> None:
        """Remove all messages but the system's."""
        self.messages = [entry for entry in self.messages if entry.role == "system"]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """What a notebook shows: all messages."""
        from mmllm.media import display

        parts: list[ContentPart] = [part for entry in self.messages for part in entry.parts]
        return display.mimebundle(parts, repr(self))
