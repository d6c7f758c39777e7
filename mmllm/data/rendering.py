"""Rendering: a conversation -> token ids, labels and positions of media. Training, chat and server
all use this renderer.

Ids, labels and positions are built in one pass, with placeholders already as wide as the features
that replace them, so they cannot diverge. The chat template is the tokenizer's own. Texts of
messages are tokenized separately from the template and with special tokens disabled, so a text that
spells a special token stays text. Some tokenizers prepend a space to every text, and many encode a
space as the beginning of the next word. Therefore pieces are tokenized as if in the middle of a
text, and a space that the template writes before a message is tokenized with the message: the ids
equal those of the whole text.

An input medium becomes N placeholders. An output medium of the assistant is rendered as its signal
tokens; if the model has an encoder for it, it is also rendered as an input at the beginning of the
next user turn, so that the model sees what it has generated.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from mmllm.conversation import Medium, Message, Text
from mmllm.data.media_layout import Grid, MediaLayout, frame_media, measure
from mmllm.data.references import ReferenceRules
from mmllm.errors import CheckpointError, ConfigError, ContextError, quoted, wrap_errors
from mmllm.tokens import TokenSpace
from mmllm.utils import sandbox

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSUPERVISED = -100
"""Label of a position that no loss uses."""

_REMEMBERED, _REMEMBERED_TURNS = 256, 64
"""Number of role sequences whose rendered template is cached, and their maximum length."""
_ANCHOR = "\n"
_SLOT = re.compile("\ue000(\\d+)\ue001")
_TOKENIZING = threading.Lock()
"""Held while tokenizing: `split_special_tokens` is state of the tokenizer until the next call."""


@dataclass(frozen=True)
class MediaSpan:
    """The positions of one medium in a rendered conversation.

    Attributes:
        key: the key of its encoder or decoder.
        medium: the medium.
        start: its first position.
        length: the number of its positions.
        grid: how they are arranged, where positions are three-dimensional.
        references: pictures that the decoder of an output medium is conditioned on.
    """

    key: str
    medium: Medium
    start: int
    length: int
    grid: Grid | None = None
    references: tuple[Medium, ...] = ()


@dataclass
class Rendered:
    """One rendered conversation, ready for batching.

    Attributes:
        ids: token ids.
        labels: rows of the output head (mmllm.tokens), or UNSUPERVISED, one per id.
        inputs: spans of the input media, in order.
        outputs: spans of the output media, in order.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    inputs: list[MediaSpan] = field(default_factory=list)
    outputs: list[MediaSpan] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_used_tokens(self) -> int:
        """The number of positions that training needs: up to the last supervised state or medium.
        The token that ends the last turn is predicted, but not an input."""
        last = max((at for at, label in enumerate(self.labels) if label != UNSUPERVISED), default=0)
        return max(last, 0, *(span.start + span.length for span in [*self.inputs, *self.outputs]))


class Renderer:
    """The renderer of one model.

    Args:
        tokenizer: the tokenizer of the language model.
        tokens: ids of placeholders and signal tokens.
        end_ids: ids of the tokens that end a reply.
        input_keys: modality -> (encoder key, N placeholders).
        output_keys: modality -> decoder key.
        template: the chat template, in jinja.
        template_options: variables of the template other than the messages.
        system_prompt: the system message of conversations that have none.
        rereads_media: whether the media of replies are read in front of the user's next turn.

    Raises:
        CheckpointError: the tokenizer fails on a short text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: TokenSpace,
        *,
        end_ids: frozenset[int],
        input_keys: Mapping[str, tuple[str, int]],
        output_keys: Mapping[str, str],
        template: str,
        template_options: Mapping[str, Any] | None = None,
        system_prompt: str = "",
        rereads_media: bool = True,
    ):
        self.layouts: Mapping[str, MediaLayout] = {}  # by modality
        self.references = ReferenceRules()
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.end_ids = end_ids
        self.input_keys = dict(input_keys)
        self.output_keys = dict(output_keys)
        self.system_prompt, self.rereads_media = system_prompt, rereads_media
        self.template = template
        self.template_options = dict(template_options or {})
        self._pieces: dict[tuple[str, bool], list[int]] = {}
        self._written: dict[tuple[tuple[str, ...], bool], str] = {}
        self._anchor = self._find_anchor()

    @cached_property
    def prefix_ids(self) -> list[int]:
        """The ids with which every conversation without its own system message begins."""
        one, other = (self.render([Message("user", (Text(word),))]).ids for word in "ab")
        return one[: common_prefix_length(one, other)]

    def render(
        self, conversation: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Render all turns of a conversation; those of the assistant are supervised.

        Args:
            conversation: messages in order; the system prompt is added if there is none.
            add_generation_prompt: whether to end with the beginning of an assistant turn.

        Raises:
            ContextError: the conversation is empty.
            ConfigError: the model cannot read or make a medium, or the chat template rejects the
                roles or takes too long.
        """
        messages = list(conversation)
        if not messages:
            raise ContextError("the conversation is empty: expected at least one message")
        if messages[0].role != "system" and self.system_prompt:
            messages = [Message("system", (Text(self.system_prompt),)), *messages]
        # template, index, template, index, …, template
        pieces = _SLOT.split(self._write(messages, add_generation_prompt))
        rendered = Rendered()
        made: list[Medium] = []
        before, role = pieces[0], None
        for slot, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            message = messages[int(slot)]
            rereads = self.rereads_media and message.role == "user"
            shown = [m for m in made if rereads and m.has_data and m.modality in self.input_keys]
            made = [] if rereads else made
            parts = [part for part in (*shown, *message.parts) if part != Text("")]
            before, parts = _lend_space(before, parts, message.role)
            head, framed, tail = frame_media(parts, message.role, self.layouts)
            self._template(rendered, before + head, after=role)
            for part in framed:
                self._part(rendered, part, message.role)
                if isinstance(part, Medium) and message.role == "assistant":
                    made.append(part)
            before, role = tail + piece, message.role
        self._template(rendered, before, after=role)
        rendered.outputs = self.references.apply(rendered.outputs, messages)
        return rendered

    def fit(
        self, conversation: Sequence[Message], max_length: int, *, reserve: int = 0
    ) -> tuple[Rendered, int]:
        """Render a conversation for generation, dropping the oldest turns until it fits.

        Args:
            conversation: messages in order; a system message is never dropped.
            max_length: context length in tokens.
            reserve: tokens to keep free for the reply.

        Returns:
            The rendered conversation, and the number of messages dropped.

        Raises:
            ContextError: the last message alone does not fit.
            ConfigError: as by `render`.
        """
        messages = list(conversation)
        system = messages[:1] if messages and messages[0].role == "system" else []
        rest = messages[len(system) :]
        dropped = 0
        while True:
            rendered = self.render([*system, *rest[dropped:]], add_generation_prompt=True)
            if len(rendered) + reserve <= max_length:
                return rendered, dropped
            dropped += 1
            while dropped < len(rest) and rest[dropped].role == "assistant":
                dropped += 1  # a conversation never begins with a reply
            if dropped >= len(rest):
                raise ContextError(
                    f"the last message alone takes {len(rendered)} tokens and {reserve} are kept "
                    f"for the reply, but the context holds {max_length}: shorten it, send fewer "
                    "media, or raise llm.max_length if the model allows it"
                )

    def encode_text(self, text: str) -> list[int]:
        """Tokenize the text of a message; special tokens in it are encoded as plain text."""
        return self._encode(text, split_special_tokens=True)

    def _encode(self, text: str, *, at_start: bool = False, **options: Any) -> list[int]:
        """Tokenize a piece from the middle of a text, or from its beginning if `at_start`."""
        if not text:
            return []
        anchored = bool(self._anchor) and not at_start
        with _TOKENIZING, wrap_errors(CheckpointError, "the tokenizer cannot read a text"):
            whole = _ANCHOR + text if anchored else text
            ids = self.tokenizer(whole, add_special_tokens=False, **options)["input_ids"]
        if not anchored:
            return ids
        if ids[: len(self._anchor)] != self._anchor:
            raise ConfigError(
                f"the tokenizer joins a line break with what follows it ({text[:20]!r}), and begins"
                " a text with a space: texts cannot be put together from pieces"
            )
        return ids[len(self._anchor) :]

    def _find_anchor(self) -> list[int]:
        """Return the ids of the anchor before a piece, which keeps the tokenizer from prepending a
        space; empty if it prepends none anyway (byte-level BPE, for example)."""
        with wrap_errors(CheckpointError, "the tokenizer cannot read a text"):
            anchor, alone, together = (
                self.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (_ANCHOR, "a", f"{_ANCHOR}a")
            )
        return [] if together == anchor + alone else anchor

    def _write(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Return the template's text with a slot for every message. For a template without a system
        role (Gemma 2, the first Mistral) the system message is prepended to the first turn."""
        roles = tuple(message.role for message in messages)
        if (roles, add_generation_prompt) in self._written:
            return self._written[roles, add_generation_prompt]
        text = self._write_turns(roles, add_generation_prompt)
        # The text depends on nothing else, unless the template uses the time.
        if len(roles) <= _REMEMBERED_TURNS and "strftime_now" not in self.template:
            if len(self._written) >= _REMEMBERED:
                self._written.clear()
            self._written[roles, add_generation_prompt] = text
        return text

    def _write_turns(self, roles: Sequence[str], add_generation_prompt: bool) -> str:
        """As `_write`, without the cache."""
        turns = [
            {"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)
        ]
        try:
            return self._apply(turns, add_generation_prompt, len(roles))
        except sandbox.InputRejected as error:
            if turns[0]["role"] == "system" and len(turns) > 1:
                first = f"{turns[0]['content']}\n\n{turns[1]['content']}"
                folded = [{**turns[1], "content": first}, *turns[2:]]
                with suppress(sandbox.InputRejected):  # the first error is the one to report
                    return self._apply(folded, add_generation_prompt, len(roles))
            raise ConfigError(
                f"the chat template refuses roles {quoted(list(roles))}: {error}"
            ) from error

    def _apply(
        self, turns: list[dict[str, str]], add_generation_prompt: bool, expected: int
    ) -> str:
        """Apply the template to turns with `expected` slots. Raises InputRejected if it fails or
        does not write every slot, ConfigError if it exceeds its resources."""
        variables = {
            "tools": None,
            "documents": None,
            **self.tokenizer.special_tokens_map,
            **self.template_options,
            "messages": turns,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = sandbox.render(self.template, variables)
        except sandbox.ResourcesExhausted as error:
            raise ConfigError(f"the chat template cannot be used: {error}") from error
        places = [int(place) for place in _SLOT.findall(text)]
        if len(places) != expected or not all(place < expected for place in places):
            raise sandbox.InputRejected(f"it writes {len(places)} of {expected} messages")
        return text

    def _part(self, rendered: Rendered, part: Text | Medium | str, role: str) -> None:
        if isinstance(part, str):
            self._template(rendered, part, after=None)
        elif isinstance(part, Text):
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
        length, grid = measure(medium, self.layouts.get(medium.modality), length)
        rendered.inputs.append(MediaSpan(key, medium, len(rendered.ids), length, grid))
        rendered.ids += [self.tokens.placeholder_id] * length
        rendered.labels += [UNSUPERVISED] * length

    def _output(self, rendered: Rendered, medium: Medium) -> None:
        if medium.modality not in self.output_keys:
            raise ConfigError(
                f"this model has no decoder for {medium.modality}; it makes "
                f"{', '.join(sorted(self.output_keys)) or 'text only'}"
            )
        key = self.output_keys[medium.modality]
        run = self.tokens.signal_ids(key)
        rendered.outputs.append(MediaSpan(key, medium, len(rendered.ids), len(run)))
        rendered.ids += run
        rendered.labels += [self.tokens.logit_index(key)] + [UNSUPERVISED] * (len(run) - 1)

    def _template(self, rendered: Rendered, piece: str, after: str | None) -> None:
        """Append the template's own text; after a reply it is supervised up to the end token."""
        place = piece, not rendered.ids
        if place not in self._pieces:
            self._pieces[place] = self._encode(piece, at_start=place[1])
        ids = self._pieces[place]
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


def first_of_each_modality(parts: Mapping[str, tuple[str, object]]) -> dict:
    """{key: (modality, value)} -> {modality: value}; the first key of a modality wins. Raises
    ConfigError for a part without a modality."""
    first: dict[str, object] = {}
    for modality, value in parts.values():
        first.setdefault(modality, value)
    if all(isinstance(modality, str) for modality in first):
        return first
    raise ConfigError("a component has no modality")


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the longest common prefix of two sequences.

    Args:
        one: a text, or a list of token ids.
        other: a sequence of the same kind; it may be shorter or longer.

    Example:
        >>> common_prefix_length("photo", "photon")
        5
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _lend_space(
    before: str, parts: list[Text | Medium], role: str
) -> tuple[str, list[Text | Medium]]:
    """Move the space at the end of a template piece to the text that follows it. Before an output
    medium it is dropped: the reply begins where the generation prompt ends."""
    if not before.endswith(" ") or not parts:
        return before, parts
    first = parts[0]
    if isinstance(first, Text):
        words = first.text if first.text.startswith(" ") else f" {first.text}"
        return before[:-1], [Text(words), *parts[1:]]
    return (before[:-1] if role == "assistant" else before), parts
