"""What these tests send, and decoders that wait."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from mmllm.conversation import user
from mmllm.demo.replying import stream_reply
from mmllm.demo.sessions import BrowserSession, SessionStore, Turn
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny
from tests.samples import picture

ALL = {"image": "force", "audio": "force", "video": "force"}


def sent(sessions: SessionStore, name: str = "cat.png", data: bytes | None = None) -> Path:
    """A file as an upload leaves it."""
    folder = sessions.root / "upload"
    folder.mkdir(exist_ok=True)
    if data is not None:
        (folder / name).write_bytes(data)
        return folder / name
    return picture(40).save(folder / name)


def spoken(chat: Chat, session: BrowserSession) -> BrowserSession:
    """A session in which a picture was sent and every kind of medium was made."""
    session.turns.append(Turn(user(picture(40), "what?")))
    session.turns[0] = Turn(user(session.keep(picture(40)), "what?"))
    list(stream_reply(chat, session, {"seed": 5, "modalities": ALL, "max_new_tokens": 3}))
    return session


class Steps:
    """Denoising steps of a decoder that wait until they are let through."""

    def __init__(self, model: AnyToAny, key: str):
        self._steps = threading.Semaphore(0)
        transformer = model.decoders[key].pipeline.transformer
        forward = transformer.forward

        def held(*args: Any, **kwargs: Any) -> Any:
            assert self._steps.acquire(timeout=120)
            return forward(*args, **kwargs)

        transformer.forward = held

    def let(self, steps: int) -> None:
        self._steps.release(steps)
