"""Replies of the demo are those of Python, and may be stopped."""

from __future__ import annotations

import numpy as np
import pytest

from mmllm.conversation import assistant, user
from mmllm.demo.replying import stream_reply
from mmllm.demo.sessions import SessionStore, Turn
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny
from tests.demo.samples import ALL, Steps, spoken
from tests.samples import picture


def test_the_demo_gives_what_python_gives(tiny_model: AnyToAny, sessions: SessionStore) -> None:
    options = {"seed": 5, "modalities": ALL, "max_new_tokens": 3}
    session = spoken(Chat(tiny_model, prefixes=0), sessions.open(None))
    plain = Chat(tiny_model, prefixes=0).reply([user(picture(40), "what?")], **options)
    made = session.turns[1].message
    assert made.text == plain.text
    for one, other in zip(made.media, plain.media, strict=True):
        assert np.array_equal(one.to_numpy(), other.to_numpy())


def test_a_stopped_answer_keeps_its_text_so_far(
    tiny_model: AnyToAny, sessions: SessionStore
) -> None:
    chat, session = Chat(tiny_model), sessions.open(None)
    session.turns.append(Turn(user("draw")))
    denoising = Steps(tiny_model, "image")
    looks = stream_reply(chat, session, {"modalities": ALL, "decoders": {"image": {"steps": 50}}})
    assert any("Drawing …" in pieces for pieces in looks)  # reads on until it is being drawn
    session.cancel.set()
    denoising.let(9)
    list(looks)
    assert not session.replying.locked()
    assert session.turns[-1].note == "stopped"
    assert session.turns[-1].message.text
    assert session.turns[-1].message.media == []

    session.turns = [Turn(user("x")), Turn(assistant("y")), Turn(user("smell"))]
    with pytest.raises(ConfigError):
        list(stream_reply(chat, session, {"modalities": {"smell": "force"}}))
    assert len(session.turns) == 3
