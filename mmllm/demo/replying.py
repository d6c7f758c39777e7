"""One reply of the demo, from the engine's events to the turn in the conversation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from mmllm.conversation import Audio, ContentPart, Medium, Message, Text
from mmllm.demo.sessions import PATIENCE, BrowserSession, Piece, Turn
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.inference.events import Done, MediumReady, MediumStarted, Progress, TextDelta
from mmllm.inference.replies import Reply

MAKING = {"image": "Drawing", "audio": "Making the sound", "video": "Animating"}
_OFTEN = 0.1
"""Least seconds between two updates of a partial reply."""


def stream_reply(
    chat: Chat, session: BrowserSession, request: dict[str, Any]
) -> Iterator[list[Piece]]:
    """Answer a session's conversation: looks at the answer as it grows, and in the end, or when
    `session.cancel` is set or the iterator is closed, one more turn in the session.

    Raises what `Chat.stream` raises, and ConfigError if the session is being answered already or is
    full; it is then as it was.
    """
    if not session.replying.acquire(timeout=PATIENCE):
        raise ConfigError("another answer is being made in this conversation: wait for it")
    if not session.turns or session.turns[-1].message.role != "user":
        session.replying.release()
        return  # the reply of another page answered this message, too
    parts: dict[int, ContentPart] = {}
    pieces: dict[int, list[Piece]] = {}
    reply: Reply | None = None
    looked, failed = 0.0, False
    try:
        session.partial = []
        session.check_space()
        session.drop_previews()
        events = chat.stream(session.conversation, cancel=session.cancel, previews=True, **request)
        with closing(events):  # pyright: ignore[reportArgumentType]
            for event in events:
                if isinstance(event, Done):
                    reply = event.reply
                    break
                if isinstance(event, TextDelta):
                    text = "".join(
                        p for p in pieces.get(event.part_index, ()) if isinstance(p, str)
                    )
                    parts[event.part_index] = Text(text + event.text)
                    pieces[event.part_index] = [text + event.text]
                elif isinstance(event, MediumStarted):
                    pieces[event.part_index] = [f"{MAKING[event.modality]} …"]
                elif isinstance(event, Progress):
                    doing = f"{MAKING[event.modality]}: step {event.step} of {event.steps}"
                    shown = pieces[event.part_index][1:]
                    if event.preview:
                        shown = [session.preview(event.preview)]
                    pieces[event.part_index] = [doing, *shown]
                elif isinstance(event, MediumReady):
                    parts[event.part_index] = medium = session.keep(event.medium)
                    pieces[event.part_index] = [medium]
                now = time.monotonic()
                if (
                    now - looked > _OFTEN
                    or isinstance(event, MediumStarted | MediumReady)
                    or (isinstance(event, Progress) and event.step == 1)
                ):
                    looked = now
                    session.partial = [piece for place in sorted(pieces) for piece in pieces[place]]
                    yield session.partial
    except GeneratorExit:
        raise
    except BaseException:
        failed = True
        raise
    finally:
        if not failed:
            session.turns.append(_turn(parts, reply, request))
        session.used = time.monotonic()
        session.replying.release()


def follow_reply(session: BrowserSession) -> Iterator[list[Piece]]:
    """Yield the partial reply that another page has requested, until it ends."""
    while session.replying.locked():
        yield session.partial
        time.sleep(3 * _OFTEN)


def _turn(parts: dict[int, ContentPart], reply: Reply | None, request: dict[str, Any]) -> Turn:
    """The turn of a reply; of a stopped reply, the parts that were generated."""
    message = Message("assistant", tuple(parts[place] for place in sorted(parts)))
    sizes = dict.fromkeys(filter(None, map(_size, message.media)))
    if reply is None:
        return Turn(message, request.get("seed"), " · ".join([*sizes, "stopped"]))
    notes = [*sizes, f"{reply.timings.total:.1f} s", *reply.notes]
    if reply.finish == "length":
        notes.append("cut at the limit of tokens")
    return Turn(message, reply.seed, " · ".join(notes))


def _size(medium: Medium) -> str:
    """The width and height of an image or video in words; "" for audio."""
    if isinstance(medium, Audio):
        return ""
    height, width = medium.to_numpy().shape[-3:-1]
    return f"{width} x {height} pixels"
