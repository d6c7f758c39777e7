"""The conversation in the format of Gradio's chatbot, and the page's error messages."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmllm.conversation import ContentPart, Medium, Text
from mmllm.demo.sessions import BrowserSession, Piece, Turn
from mmllm.errors import MmllmError

log = logging.getLogger(__name__)

MODALITY_NAMES = {"image": "picture", "audio": "sound", "video": "clip"}
"""Modality -> its name on the page."""
_REMEDY_IN_PYTHON = re.compile(r",? or use `with mmllm\.[^`]*`")


def shown_turns(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Convert turns to the messages of Gradio's chatbot, one message a turn."""
    messages = []
    for turn in turns:
        pieces: list[Piece] = [
            part.text if isinstance(part, Text) else part for part in turn.message.parts
        ]
        content = _pieces(pieces)
        if turn.message.role == "assistant":
            seed = [] if turn.seed is None else [f"seed {turn.seed}"]
            content.append(" · ".join([*seed, turn.note]))
        messages.append({"role": turn.message.role, "content": content})
    return messages


def partial_answer(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Convert a partial reply to a message of the chatbot."""
    return {"role": "assistant", "content": _pieces(pieces)}


def sentence(error: Exception, root: Path) -> str:
    """Return the page's message for an error, without remedies for Python programs and without the
    folders below `root`, whose names are secret. Unexpected errors are logged."""
    if isinstance(error, MmllmError):
        message = _REMEDY_IN_PYTHON.sub("", str(error))
        return re.sub(re.escape(str(root)) + r"/(?:[^/\s]+/)*", "", message)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk of the computer that runs this demo is full"
    log.error("the demo failed", exc_info=error)
    return "something went wrong here; the log of the demo says what"


def _pieces(pieces: Sequence[Piece]) -> list[Any]:
    """Return texts and files, without empty texts."""
    shown: list[Any] = []
    for piece in pieces:
        if isinstance(piece, Medium):
            shown.append(
                {"path": str(piece.source), "alt_text": f"a {MODALITY_NAMES[piece.modality]}"}
            )
        elif piece.strip():
            shown.append(piece.strip())
    return shown or ["…"]


def drop_answers(session: BrowserSession) -> None:
    """Remove the replies after the last user message."""
    while session.turns and session.turns[-1].message.role == "assistant":
        session.turns.pop()


def take_back(session: BrowserSession) -> dict[str, Any]:
    """Remove the last message if it is the user's; return it as the value of the message box."""
    if not session.turns or session.turns[-1].message.role != "user":
        return box_value("", ())
    message = session.turns.pop().message
    return box_value(message.text, message.media)


def box_value(text: str, media: Sequence[ContentPart]) -> dict[str, Any]:
    """Return the value of the message box."""
    return {"text": text, "files": [str(m.source) for m in media if isinstance(m, Medium)]}
