"""Chats with memory: longer than the model's context, alone and together, turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mmllm
from mmllm.conversation import assistant, user
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.inference.events import Done
from mmllm.model import AnyToAny
from tests.inference.prompts import ALL, eager
from tests.samples import picture, sound

MEMORY = {"window": 24, "block": 8, "blocks": 4}
LONG = "one two three four five six seven eight nine ten " * 60
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.8}


@pytest.fixture
def make_chat(make_model: Callable[..., AnyToAny], system_tree: dict) -> Callable[..., Chat]:
    def make(prefixes: int = 0, **memory: int) -> Chat:
        llm = {**system_tree["llm"], "memory": {**MEMORY, **memory}}
        return Chat(make_model(llm=llm), prefixes=prefixes)

    return make


def test_a_conversation_may_be_longer_than_the_models_context(
    make_chat: Callable[..., Chat], tiny_model: AnyToAny
) -> None:
    chat, asked = make_chat(), [user(LONG, picture(40), "what is this?")]
    assert chat.count_tokens(asked) > tiny_model.llm.base_model.config.max_position_embeddings
    reply = chat.reply(asked, seed=1, **OPTIONS)
    assert reply.usage.prompt == chat.count_tokens(asked)
    assert reply.notes == ()
    assert len(reply.ids) > 0
    with pytest.raises(mmllm.ContextError):
        Chat(tiny_model).reply(asked)
    events = list(chat.stream(asked, seed=1, **OPTIONS))
    assert isinstance(events[-1], Done)
    assert events[-1].reply.ids == reply.ids


def test_replies_in_a_batch_are_those_of_single_calls(make_chat: Callable[..., Chat]) -> None:
    """Prompts of any length, several samples of one prompt, and media in some replies only."""
    chat = make_chat()
    eager(chat.model, "audio")
    asked = [
        [user(LONG)],
        [user("hello")],
        [user(picture(40), LONG[:300], sound(0.2))],
        [user(LONG)],
        [user(LONG)],
    ]
    seeds = [3, 4, 5, 6, 7]
    together = chat.reply_many(asked, seeds=seeds, max_media=1, **OPTIONS)
    for talk, seed, reply in zip(asked, seeds, together, strict=True):
        alone = chat.reply(talk, seed=seed, max_media=1, **OPTIONS)
        assert alone.ids == reply.ids
        assert len(alone.media) == len(reply.media) == 1
    same = chat.reply_many([asked[0]] * 3, seeds=seeds[:3], max_media=1, **OPTIONS)
    assert same[0].ids == together[0].ids


def test_forced_media_are_made_behind_a_long_text(make_chat: Callable[..., Chat]) -> None:
    reply = make_chat().reply([user(LONG)], seed=2, modalities=ALL, **OPTIONS)
    assert sorted(medium.modality for medium in reply.media) == ["audio", "image", "video"]


def test_the_next_turn_reads_only_what_is_new(make_chat: Callable[..., Chat]) -> None:
    chat = make_chat(prefixes=2, blocks=1000)
    talk = [user(LONG, picture(40)), assistant("ten"), user("and?")]
    first = chat.reply(talk[:1], seed=1, **OPTIONS)
    assert first.usage.cached < 100
    talk = [*talk[:1], first.message, user("and? one two")]
    second = chat.reply(talk, seed=1, **OPTIONS)
    assert second.usage.cached > first.usage.prompt - 5
    assert second.ids == make_chat(blocks=1000).reply(talk, seed=1, **OPTIONS).ids


def test_scores_are_those_of_the_whole_text_if_all_is_read(
    make_chat: Callable[..., Chat], tiny_model: AnyToAny
) -> None:
    asked, replies = [user(LONG[:400], picture(40), "which?")], ["one", "two three", "ten"]
    wanted = Chat(tiny_model).score(asked, replies)
    assert make_chat(blocks=1000).score(asked, replies) == pytest.approx(wanted, abs=1e-3)
    part = make_chat().score([user(LONG, "which?")], replies)
    assert len(part) == 3
    assert all(torch.tensor(part) < 0)


def test_a_loaded_model_gets_memory_by_an_option(system_tree: dict, tmp_path: Any) -> None:
    import yaml

    path = tmp_path / "system.yaml"
    path.write_text(yaml.safe_dump({"system": system_tree}), encoding="utf-8")
    assert mmllm.load(path).model.llm.max_length == 256
    assert mmllm.load(path, memory=True).model.llm.max_length == 65_536
    chat = mmllm.load(path, memory={**MEMORY, "max_length": 900})
    assert chat.model.llm.max_length == 900
    assert chat.fingerprint != mmllm.load(path).fingerprint
    with pytest.raises(ConfigError, match="unknown key 'windows'; did you mean 'window'"):
        mmllm.load(path, memory={"windows": 3})
