"""The conversation in the format of Gradio's chatbot, and the page's error messages."""

from __future__ import annotations

import errno
import html
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmllm.conversation import ContentPart, Medium, Text
from mmllm.demo.markdown import to_html
from mmllm.demo.sessions import BrowserSession, Piece, Turn
from mmllm.errors import MmllmError

log = logging.getLogger(__name__)

MODALITY_NAMES = {"image": "picture", "audio": "sound", "video": "clip"}
"""Modality -> its name on the page."""
_REMEDY_IN_PYTHON = re.compile(r",? or use `with mmllm\.[^`]*`")


def shown_turns(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Convert turns to the messages of Gradio's chatbot, one message a turn.

    The user's text is shown as it was written, that of a reply as Markdown, with its note and a
    button that copies the text below it.
    """
    messages = []
    for turn in turns:
        if turn.message.role == "assistant":
            message = partial_answer(_pieces(turn))
            message["content"].append(_html(_footer(turn)))
        else:
            message = {"role": turn.message.role, "content": _shown(_pieces(turn), _plain)}
        messages.append(message)
    return messages


def partial_answer(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Convert a partial reply to a message of the chatbot."""
    return {"role": "assistant", "content": _shown(pieces, lambda text: _html(to_html(text)))}


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


def _pieces(turn: Turn) -> list[Piece]:
    return [part.text if isinstance(part, Text) else part for part in turn.message.parts]


def _shown(pieces: Sequence[Piece], show: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return texts, converted by `show`, and files, without empty texts."""
    shown: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, Medium):
            name = f"a {MODALITY_NAMES[piece.modality]}"
            shown.append({"path": str(piece.source), "alt_text": name})
        elif piece.strip():
            shown.append(show(piece.strip()))
    return shown or [show("…")]


def _plain(text: str) -> dict[str, Any]:
    """A text of the chatbot, which takes it for HTML; it would also unindent a mere string."""
    return {"type": "text", "text": html.escape(text, quote=False)}


def _html(value: str) -> dict[str, Any]:
    """A gr.HTML in the chatbot."""
    return {
        "type": "component",
        "component": "html",
        "value": value,
        "constructor_args": {},
        "props": {},
    }


def _footer(turn: Turn) -> str:
    """Return the HTML below a reply: seed, note, and a button that copies the text."""
    seed = [] if turn.seed is None else [f"seed {turn.seed}"]
    note = html.escape(" · ".join([*seed, turn.note]))
    text = html.escape(turn.message.text)
    copy = f'<button type="button" class="copy" data-text="{text}">Copy</button>' if text else ""
    return f'<p class="note">{note} {copy}</p>'


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
