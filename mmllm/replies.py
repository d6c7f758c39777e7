"""A reply, and the events by which it comes: plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from mmllm.conversation import Image, Medium, Message


@dataclass(frozen=True)
class Usage:
    """Tokens of a turn. `prompt`: of the whole conversation, its media's placeholders included;
    `cached`: how many of these were read before, as an earlier turn's or as the opening of all
    (the template's and the system prompt); `text` and `signals`: of the reply."""

    prompt: int = 0
    cached: int = 0
    text: int = 0
    signals: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds since the request came (waiting for others included) to the first token, the end of
    the text and the end; `media`: seconds that each decoder took, by its key."""

    first_token: float = 0.0
    text: float = 0.0
    total: float = 0.0
    media: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What the model said. `seed` repeats it; `notes` tells what the caller should know;
    `finish`: "end", "length" (the limit of tokens) or "stop" (a stop string)."""

    message: Message
    seed: int
    ids: list[int] = field(repr=False)
    finish: str = "end"
    notes: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings, compare=False)

    @property
    def text(self) -> str:
        return self.message.text

    @property
    def media(self) -> list[Medium]:
        return self.message.media


@dataclass(frozen=True)
class TextDelta:
    """More text of part `place` of the message."""

    place: int
    text: str


@dataclass(frozen=True)
class MediumStarted:
    """Part `place` will be a medium; it is made while the text goes on."""

    place: int
    modality: str


@dataclass(frozen=True)
class Progress:
    """Denoising step `step` of `steps` is done; `preview` now and then, where there is one."""

    place: int
    modality: str
    step: int
    steps: int
    preview: Image | None = None


@dataclass(frozen=True)
class MediumReady:
    """Part `place` of the message."""

    place: int
    medium: Medium


@dataclass(frozen=True)
class Done:
    """The last event: the reply as `Chat.reply` gives it."""

    reply: Reply


Event: TypeAlias = TextDelta | MediumStarted | Progress | MediumReady | Done
