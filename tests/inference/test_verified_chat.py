"""`Chat.reply(…, verify=…)`: the thin hook, sync and async, on a real tiny model."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from mmllm.decoders.contract import Cancelled
from mmllm.inference.chat import Chat
from mmllm.inference.replies import Reply
from mmllm.model import AnyToAny
from tests.inference.comparing import same

OPTIONS: dict[str, Any] = {"modalities": ["image"], "max_new_tokens": 4}


def test_an_accepted_first_reply_is_the_plain_one(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    plain = chat.reply("one two", seed=3, **OPTIONS)
    verified = chat.reply("one two", seed=3, verify=lambda _: True, **OPTIONS)
    assert plain.image is not None
    assert same(plain, verified)
    assert plain.verification is None
    assert verified.verification is not None
    assert verified.verification.num_tries == 1


def test_later_tries_are_the_replies_of_the_next_seeds(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    reply = chat.reply("one", seed=3, verify=lambda found: found.seed == 5 or "no", **OPTIONS)
    assert same(reply, chat.reply("one", seed=5, **OPTIONS))
    assert reply.verification is not None
    assert reply.verification.reasons == ("no", "no")


def test_a_coroutine_function_verifies_in_areply(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    threads: list[int] = []

    async def verify(found: Reply) -> bool:
        await asyncio.sleep(0)
        threads.append(threading.get_ident())
        return found.seed == 4

    async def main() -> Reply:
        threads.append(threading.get_ident())
        return await chat.areply("one", seed=3, verify=verify, **OPTIONS)

    reply = asyncio.run(main())
    assert reply.seed == 4
    assert len(threads) == 3
    assert len(set(threads)) == 1  # the loop's own


def test_the_model_thinks_in_words_and_looks_at_what_it_made(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    reply = chat.reply("one two", seed=3, think_first=True, verify="look-again", tries=2, **OPTIONS)
    assert reply.notes[0].startswith("thought first: ")
    assert len(reply.images) == 1
    assert reply.verification is not None
    assert 1 <= reply.verification.num_tries <= 2


def test_cancelling_ends_the_tries(tiny_model: AnyToAny) -> None:
    cancel = threading.Event()

    def verify(_: Reply) -> bool:
        cancel.set()
        return False

    with pytest.raises(Cancelled):
        Chat(tiny_model).reply("one", seed=3, verify=verify, cancel=cancel, **OPTIONS)
