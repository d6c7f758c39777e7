"""One answer of the demo, from the engine's events to what stands in the conversation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, TypeAlias

from mmllm.chat import Chat
from mmllm.conversation import Medium, Message, Part, Text
from mmllm.demo.rooms import Room, Turn
from mmllm.replies import Done, MediumReady, MediumStarted, Progress, Reply, TextDelta

Piece: TypeAlias = str | Medium
"""What the page shows of an answer: words, a medium or a preview, in order."""

MAKING = {"image": "Drawing", "audio": "Making the sound", "video": "Animating"}
_OFTEN = 0.1
"""Seconds between two looks at an answer at least."""


def answer(chat: Chat, room: Room, request: dict[str, Any]) -> Iterator[list[Piece]]:
    """Answer a room's conversation: looks at the answer as it grows, and in the end, or when
    `room.cancel` is set or the iterator is closed, one more turn in the room.

    Raises what `Chat.stream` raises; the room is then as it was.
    """
    if not room.answering.acquire(blocking=False):
        return
    parts: dict[int, Part] = {}
    pieces: dict[int, list[Piece]] = {}
    reply: Reply | None = None
    looked, failed = 0.0, False
    try:
        room.drop_previews()
        events = chat.stream(room.conversation, cancel=room.cancel, previews=True, **request)
        with closing(events):  # pyright: ignore[reportArgumentType]
            for event in events:
                if isinstance(event, Done):
                    reply = event.reply
                    break
                if isinstance(event, TextDelta):
                    text = "".join(p for p in pieces.get(event.place, ()) if isinstance(p, str))
                    parts[event.place] = Text(text + event.text)
                    pieces[event.place] = [text + event.text]
                elif isinstance(event, MediumStarted):
                    pieces[event.place] = [f"{MAKING[event.modality]} …"]
                elif isinstance(event, Progress):
                    doing = f"{MAKING[event.modality]}: step {event.step} of {event.steps}"
                    shown = pieces[event.place][1:]
                    if event.preview:
                        shown = [room.preview(event.preview)]
                    pieces[event.place] = [doing, *shown]
                elif isinstance(event, MediumReady):
                    parts[event.place] = medium = room.keep(event.medium)
                    pieces[event.place] = [medium]
                now = time.monotonic()
                if (
                    now - looked > _OFTEN
                    or isinstance(event, MediumStarted | MediumReady)
                    or (isinstance(event, Progress) and event.step == 1)
                ):
                    looked = now
                    yield [piece for place in sorted(pieces) for piece in pieces[place]]
    except GeneratorExit:
        raise
    except BaseException:
        failed = True
        raise
    finally:
        if not failed:
            room.turns.append(_turn(parts, reply, request))
        room.answering.release()


def _turn(parts: dict[int, Part], reply: Reply | None, request: dict[str, Any]) -> Turn:
    """What was said; of an answer that was stopped, as far as it came."""
    message = Message("assistant", tuple(parts[place] for place in sorted(parts)))
    if reply is None:
        return Turn(message, request.get("seed"), "stopped")
    notes = [f"{reply.timings.total:.1f} s", *reply.notes]
    if reply.finish == "length":
        notes.append("cut at the limit of tokens")
    return Turn(message, reply.seed, " · ".join(notes))
