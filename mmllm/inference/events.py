"""The events by which a reply comes, and the one sink that takes them: plain data, no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from mmllm.conversation import Image, Medium
from mmllm.inference.replies import Reply


@dataclass(frozen=True)
class TextDelta:
    """More text of a part of the message.

    Attributes:
        part_index: the part.
        text: the new text, to be appended.
    """

    part_index: int
    text: str


@dataclass(frozen=True)
class MediumStarted:
    """A part of the message will be a medium; it is generated while the text continues.

    Attributes:
        part_index: the part.
        modality: image, audio or video.
    """

    part_index: int
    modality: str
    text: ClassVar[str] = ""


@dataclass(frozen=True)
class Progress:
    """Denoising step `step` of `steps` is done.

    Attributes:
        part_index: the medium's part of the message.
        modality: the medium's modality.
        step: from 1 to `steps`.
        steps: number of steps.
        preview: a small image of what there is, now and then, if previews were asked for.
        batch_index: the medium's place in the batch in which the request's media are made.
    """

    part_index: int
    modality: str
    step: int
    steps: int
    preview: Image | None = None
    batch_index: int = 0
    text: ClassVar[str] = ""


@dataclass(frozen=True)
class MediumReady:
    """A medium has been generated.

    Attributes:
        part_index: its part of the message.
        medium: the medium.
    """

    part_index: int
    medium: Medium
    text: ClassVar[str] = ""


@dataclass(frozen=True)
class Done:
    """The last event: the reply as `Chat.reply` gives it."""

    reply: Reply
    text: ClassVar[str] = ""


Event: TypeAlias = TextDelta | MediumStarted | Progress | MediumReady | Done
"""Each has `text`, empty but for TextDelta: `print(event.text, end="")` streams the text."""

EventSink: TypeAlias = Callable[[int, Event], None]
"""Takes (index of the conversation, event) from several threads. It may raise, which ends the
request."""

OnStep: TypeAlias = Callable[[str, int, int], None]
"""Takes (output key, step, steps) while media are made; never called twice at once."""


def ignore(conversation: int, event: Event) -> None:
    """Do nothing: the sink of a request whose events nobody reads.

    Args:
        conversation: the conversation's place in the request.
        event: the event.
    """


def step_sink(on_step: OnStep, output_keys: Mapping[str, str]) -> EventSink:
    """A sink that calls `on_step` once for each step of a batch of media.

    Args:
        on_step: the caller's function.
        output_keys: modality -> output key.
    """
    lock = threading.Lock()

    def sink(conversation: int, event: Event) -> None:
        if isinstance(event, Progress) and event.batch_index == 0:
            with lock:
                on_step(output_keys[event.modality], event.step, event.steps)

    return sink
