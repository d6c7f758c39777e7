"""Media that start from one in the conversation: "make it blue"."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmllm.conversation import Conversation, Medium, assistant, user
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.inference.replies import Reply
from mmllm.model import AnyToAny
from tests.samples import clip, picture

ONE = {"modalities": {"image": "force"}, "max_new_tokens": 4, "max_media": 1}
LAST = {"image": {"init_media": "last"}}


def asked(tiny_model: AnyToAny, monkeypatch) -> dict[str, list[list[Medium] | None]]:
    """The `init_media` of each call of each decoder."""
    calls: dict[str, list[list[Medium] | None]] = {}
    for key, decoder in tiny_model.decoders.items():

        def recording(*args: Any, key: str = key, plain=decoder.sample, **options: Any):
            calls.setdefault(key, []).append(options.get("init_media"))
            return plain(*args, **options)

        monkeypatch.setattr(decoder, "sample", recording)
    return calls


def pixels(reply: Reply) -> np.ndarray:
    return reply.media[0].to_numpy()


def test_last_is_the_newest_medium_of_its_kind(tiny_model, monkeypatch):
    calls, chat = asked(tiny_model, monkeypatch), Chat(tiny_model)
    older, newer, drawn = picture(10), picture(90), picture(200)
    turns: Conversation = [
        user("one", older, newer),
        assistant("two", drawn, clip(30)),
        user("three"),
    ]
    chat.reply(turns, seed=1, decoders=LAST, **ONE)
    chat.reply(turns[:1], seed=1, decoders=LAST, **ONE)
    chat.reply([user("four")], seed=1, decoders=LAST, **ONE)
    chat.reply(turns, seed=1, **ONE)
    assert calls["image"] == [[drawn], [newer], None, None]


def test_the_source_changes_the_picture_and_the_strength_how_much(tiny_model):
    chat = Chat(tiny_model)

    def made(level: int, **options: Any) -> np.ndarray:
        decoders = {"image": {"steps": 10, **options}}
        return pixels(chat.reply([user(picture(level))], seed=1, decoders=decoders, **ONE))

    dark, light = (made(level, init_media="last", strength=0.1) for level in (10, 245))
    assert not np.array_equal(dark, light)
    assert np.array_equal(dark, made(10, init_media="last", strength=0.1))
    assert not np.array_equal(dark, made(10, init_media="last", strength=0.9))
    assert np.array_equal(made(10), made(10, init_media="none"))


def test_a_batch_of_conversations_with_and_without_a_source(tiny_model, monkeypatch):
    calls, chat = asked(tiny_model, monkeypatch), Chat(tiny_model)
    turns = [[user(picture(10), "one")], [user("two")], [user("three", picture(200))]]
    batch = chat.reply_many(turns, seeds=[1, 2, 3], decoders=LAST, **ONE)
    assert [call and len(call) for call in calls["image"]] == [2, None]
    for turn, seed, reply in zip(turns, (1, 2, 3), batch, strict=True):
        alone = chat.reply(turn, seed=seed, decoders=LAST, **ONE)
        assert np.abs(pixels(alone).astype(int) - pixels(reply)).max() <= 1


def test_a_system_can_always_start_from_the_last(make_model, system_tree, monkeypatch):
    decoders = dict(system_tree["decoders"])
    decoders["video"] = {**decoders["video"], "init_media": "last", "strength": 0.5}
    model = make_model(decoders=decoders)
    calls = asked(model, monkeypatch)
    ask = {"modalities": {"video": "force"}, "max_new_tokens": 4, "max_media": 1, "seed": 1}
    moving = clip(90)
    chat = Chat(model)
    chat.reply([user(moving, picture(10))], **ask)
    chat.reply([user(moving)], decoders={"video": {"init_media": "none"}}, **ask)
    assert calls["video"] == [[moving], None]


def test_what_cannot_start_from_a_medium_is_refused_before_any_work(tiny_model, monkeypatch):
    calls, chat = asked(tiny_model, monkeypatch), Chat(tiny_model)
    with pytest.raises(ConfigError, match="audio: unknown option 'init_media'"):
        chat.reply([user("one")], decoders={"audio": {"init_media": "last"}})
    with pytest.raises(ConfigError, match=r"0\.1 of 2 steps is less than one"):
        chat.reply([user("one")], decoders={"image": {"init_media": "last", "strength": 0.1}})
    with pytest.raises(ConfigError, match="expected none or last, got 'first'"):
        chat.reply([user("one")], decoders={"image": {"init_media": "first"}})
    assert not calls
