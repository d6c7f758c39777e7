"""A conversation -> token ids, labels and the places of media: the one renderer of training,
chat and server.

Ids, labels and positions grow in one pass, with every medium already as wide as what will fill
it, so they cannot drift. The chat template is the tokenizer's own; what people say is tokenised
apart from it and with special tokens switched off, so a text that spells a special token stays
text.

A medium that a user gives becomes N placeholders. A medium that the assistant makes is the signal
run that made it; at the beginning of the next user turn the model is shown what came of it,
through its encoder, so that it can speak of what it drew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmllm.conversation import Medium, Message, Text
from mmllm.errors import ConfigError, ContextError
from mmllm.tokens import TokenSpace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSUPERVISED = -100
"""Label of a position that no loss looks at."""

_SLOT = re.compile("\ue000(\\d+)\ue001")
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For a base model that has no chat template of its own."""


@dataclass(frozen=True)
class Place:
    """Where one medium stands: positions start … start + length - 1 belong to `key`."""

    key: str
    medium: Medium
    start: int
    length: int


@dataclass
class Rendered:
    """One conversation, ready for batching. `labels` hold rows of the head (mmllm.tokens)."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    inputs: list[Place] = field(default_factory=list)
    outputs: list[Place] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


class Renderer:
    """Renders for one model: its tokenizer, its tokens, its encoders and decoders."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: TokenSpace,
        *,
        end_ids: frozenset[int],
        input_keys: Mapping[str, tuple[str, int]],
        output_keys: Mapping[str, str],
        system_prompt: str = "",
    ):
        """`input_keys`: modality -> (encoder key, N); `output_keys`: modality -> decoder key."""
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.end_ids = end_ids
        self.input_keys = dict(input_keys)
        self.output_keys = dict(output_keys)
        self.system_prompt = system_prompt
        own = tokenizer.chat_template
        self.template = own if isinstance(own, str) and own else _PLAIN_TEMPLATE
        self._pieces: dict[str, list[int]] = {}

    def render(self, conversation: Sequence[Message], *, for_reply: bool = False) -> Rendered:
        """All turns with the assistant's supervised; `for_reply` ends where a reply begins."""
        messages = list(conversation)
        if not messages:
            raise ContextError("the conversation is empty: expected at least one message")
        if messages[0].role != "system" and self.system_prompt:
            messages = [Message("system", (Text(self.system_prompt),)), *messages]
        turns = [
            {"role": message.role, "content": f"\ue000{index}\ue001"}
            for index, message in enumerate(messages)
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=for_reply
            )
        except Exception as error:  # templates raise their own classes, from jinja
            raise ConfigError(
                f"the chat template refuses roles {[turn['role'] for turn in turns]}: {error}"
            ) from error
        pieces = _SLOT.split(str(text))  # template, index, template, index, …, template
        rendered = Rendered()
        self._template(rendered, pieces[0], after=None)
        made: list[Medium] = []
        for slot, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            message = messages[int(slot)]
            if message.role == "user":
                for medium in made:
                    if medium.has_data and medium.modality in self.input_keys:
                        self._input(rendered, medium)
                made = []
            for part in message.parts:
                self._part(rendered, part, message.role)
                if isinstance(part, Medium) and message.role == "assistant":
                    made.append(part)
            self._template(rendered, piece, after=message.role)
        return rendered

    def fit(
        self, conversation: Sequence[Message], max_length: int, *, room: int = 0
    ) -> tuple[Rendered, int]:
        """Render for a reply within max_length - room tokens; the oldest turns go first.

        Returns the rendering and how many messages were dropped. Raises ContextError if the last
        message alone does not fit.
        """
        messages = list(conversation)
        opening = messages[:1] if messages and messages[0].role == "system" else []
        rest = messages[len(opening) :]
        dropped = 0
        while True:
            rendered = self.render([*opening, *rest[dropped:]], for_reply=True)
            if len(rendered) + room <= max_length:
                return rendered, dropped
            dropped += 1
            while dropped < len(rest) and rest[dropped].role == "assistant":
                dropped += 1  # a conversation never opens with a reply to nothing
            if dropped >= len(rest):
                raise ContextError(
                    f"the last message alone takes {len(rendered)} tokens and {room} are kept for "
                    f"the reply, but the context holds {max_length}: shorten it, send fewer media, "
                    "or raise llm.max_length if the model allows it"
                )

    def encode_text(self, text: str) -> list[int]:
        """What somebody said: special tokens in it stay plain text."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]

    def _part(self, rendered: Rendered, part: Text | Medium, role: str) -> None:
        if isinstance(part, Text):
            ids = self.encode_text(part.text)
            rendered.ids += ids
            rendered.labels += ids if role == "assistant" else [UNSUPERVISED] * len(ids)
        elif role == "assistant":
            self._output(rendered, part)
        else:
            self._input(rendered, part)

    def _input(self, rendered: Rendered, medium: Medium) -> None:
        if medium.modality not in self.input_keys:
            raise ConfigError(
                f"this model has no encoder for {medium.modality}; it reads "
                f"{', '.join(sorted(self.input_keys)) or 'text only'}"
            )
        key, length = self.input_keys[medium.modality]
        rendered.inputs.append(Place(key, medium, len(rendered.ids), length))
        rendered.ids += [self.tokens.placeholder] * length
        rendered.labels += [UNSUPERVISED] * length

    def _output(self, rendered: Rendered, medium: Medium) -> None:
        if medium.modality not in self.output_keys:
            raise ConfigError(
                f"this model has no decoder for {medium.modality}; it makes "
                f"{', '.join(sorted(self.output_keys)) or 'text only'}"
            )
        key = self.output_keys[medium.modality]
        run = self.tokens.run(key)
        rendered.outputs.append(Place(key, medium, len(rendered.ids), len(run)))
        rendered.ids += run
        rendered.labels += [self.tokens.head_row(key)] + [UNSUPERVISED] * (len(run) - 1)

    def _template(self, rendered: Rendered, piece: str, after: str | None) -> None:
        """The template's own text; after a reply it is supervised up to the end of the turn."""
        if piece not in self._pieces:
            self._pieces[piece] = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids = self._pieces[piece]
        supervised = 0
        if after == "assistant":
            ends = [index for index, token in enumerate(ids) if token in self.end_ids]
            if not ends:
                raise ConfigError(
                    f"the chat template does not end a reply with an end token {set(self.end_ids)}:"
                    f" it writes {piece!r}; set eos_token_id in the generation config"
                )
            supervised = ends[0] + 1
        rendered.ids += ids
        rendered.labels += ids[:supervised] + [UNSUPERVISED] * (len(ids) - supervised)
