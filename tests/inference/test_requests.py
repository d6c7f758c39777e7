"""One call: its states, its events, and one conversation with several seeds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mmllm import config, model
from mmllm.conversation import Image, Message, user
from mmllm.decoders.contract import Cancelled
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import ContinuousBatcher, generate
from mmllm.inference.cancel import CancelToken
from mmllm.inference.chat import Chat
from mmllm.inference.events import Event, EventSink, MediumReady, Progress, TextDelta, ignore
from mmllm.inference.media_queue import MediaRequest
from mmllm.inference.outputs import SignalSpan
from mmllm.inference.prefill import Prefill
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.requests import ReplyRequest
from mmllm.inference.sampling import Sampling
from mmllm.inference.settings import resolve_settings
from mmllm.model import AnyToAny

ASKED = [user("Draw a red apple, please.")]
WISHES: dict[str, Any] = {"image": "force", "audio": "forbid", "video": "forbid"}
OPTIONS: dict[str, Any] = {"modalities": WISHES, "max_new_tokens": 8}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def system(system_tree: dict, request: pytest.FixtureRequest) -> AnyToAny:
    return model.build(config.parse_system(system_tree), dtype=request.param, seed=0).eval()


def pixels(reply: Any) -> np.ndarray:
    return np.stack([medium.to_numpy() for medium in reply.media]).astype(int)


@pytest.mark.parametrize("prefixes", [0, 2])
def test_a_seeds_picture_in_a_batch_is_the_one_it_gives_alone(
    system: AnyToAny, prefixes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions: list[torch.Tensor] = []
    condition = system.condition

    def noted(signals: dict[str, torch.Tensor], captions: Any) -> Any:
        conditions.extend(signals["image"])
        return condition(signals, captions)

    monkeypatch.setattr(system, "condition", noted)
    alone = [Chat(system, prefixes=prefixes).reply(ASKED, seed=seed, **OPTIONS) for seed in (5, 6)]
    batch = Chat(system, prefixes=prefixes).reply_many([ASKED] * 2, seeds=[5, 6], **OPTIONS)
    assert all(states.equal(conditions[0]) for states in conditions)
    assert len(conditions) == 4
    for one, other in zip(alone, batch, strict=True):
        assert one.ids == other.ids
        assert one.seed == other.seed
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert np.abs(pixels(batch[0]) - pixels(batch[1])).max() > 20


def test_prompts_are_shared_only_where_their_media_are_equal(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal words with different media are different prompts; media are generated for each seed."""
    sizes: list[int] = []
    join = ContinuousBatcher.join
    monkeypatch.setattr(
        ContinuousBatcher,
        "join",
        lambda self, entry: sizes.append(len(entry.sequences)) or join(self, entry),
    )

    def seen(value: int) -> list[Message]:
        return [user(Image.from_numpy(np.full((16, 16, 3), value, np.uint8)), "What is this?")]

    talks = [seen(10), seen(200), seen(10), ASKED]
    chat = Chat(tiny_model)
    options = {"modalities": dict.fromkeys(WISHES, "forbid"), "max_new_tokens": 8}
    together = chat.reply_many(talks, **options)
    alone = [chat.reply(talk, **options) for talk in talks]
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert [reply.usage.text for reply in together] == [len(reply.ids) for reply in alone]
    drawn = chat.reply_many([ASKED] * 2, seeds=[1, 2], temperature=5.0, **options)
    assert drawn[0].ids != drawn[1].ids
    assert sizes == [3, 1, 1, 1, 1, 2]


def test_steps_are_reported_for_the_media_of_all_seeds(tiny_model: AnyToAny) -> None:
    steps: list[tuple[str, int, int]] = []
    replies = Chat(tiny_model).reply_many(
        [ASKED] * 3, seeds=[0, 1, 0], on_step=lambda *step: steps.append(step), **OPTIONS
    )
    assert [[medium.modality for medium in reply.media] for reply in replies] == [["image"]] * 3
    first, second, third = map(pixels, replies)
    assert (first == third).all()
    assert (first != second).any()
    assert len(steps) == 2  # one batch


def request_of(
    chat: Chat, conversations: list[list[Message]], sink: EventSink = ignore, **options: Any
) -> ReplyRequest:
    settings = resolve_settings(
        chat.model, conversations, seeds=options.pop("seeds"), sampling=options, modalities=WISHES
    )
    features = FeatureCache(chat.model, enabled=False)
    return ReplyRequest(
        chat.engine, features, conversations, settings, sink=sink, cancel=CancelToken()
    )


@pytest.mark.parametrize("num", [1, 2])
def test_a_request_goes_from_state_to_state(tiny_model: AnyToAny, num: int) -> None:
    """Media are made in the state that fits the request: during the text, or in one batch."""
    chat, states, rendered = Chat(tiny_model), [], []
    talks = [[user("one")], [user("two")]][:num]
    generate, render = chat.engine.generate, chat.engine.render_media

    def polled(prefills: Sequence[Prefill], poll: Callable[[], bool]) -> None:
        states.append(request.state)
        generate(prefills, poll)
        states.append(request.state)

    def noted(wanted: MediaRequest) -> Any:
        rendered.append(len(wanted.places))
        return render(wanted)

    chat.engine.generate, chat.engine.render_media = polled, noted  # pyright: ignore
    request = request_of(chat, talks, seeds=[4, 5][:num], max_new_tokens=5)
    assert request.state == "prefill"
    replies = request.run()
    assert states == ["text", "media"]
    assert request.state == "done"
    assert rendered == [num]
    assert [type(reply.message.parts[-1]) for reply in replies] == [Image] * num
    assert chat.engine.is_idle


def test_a_reply_is_what_its_parts_give_one_by_one(tiny_model: AnyToAny) -> None:
    """The ids of `generate`, its text decoded at once, and the decoder called with the span's
    states and the noise of the seed: to the byte."""
    chat, seed = Chat(tiny_model), 11
    reply = chat.reply(ASKED, seed=seed, temperature=1.0, **OPTIONS)
    (output,) = generate(
        tiny_model,
        [tiny_model.renderer.render(ASKED, add_generation_prompt=True)],
        FeatureCache(tiny_model, enabled=False),
        sampling=Sampling(max_new_tokens=8, temperature=1.0, modalities=WISHES),
        generators=[torch.Generator().manual_seed(seed)],
        prefix_cache=PrefixCache(0),
    )
    assert reply.ids == output.ids
    assert reply.finish == output.finish
    assert reply.text == tiny_model.llm.tokenizer.decode(output.ids, skip_special_tokens=True)
    (index,) = [n for n, piece in enumerate(output.pieces) if isinstance(piece, SignalSpan)]
    with torch.inference_mode():
        condition = tiny_model.condition({"image": output.spans[0].states[None]})["image"]
        noise = torch.Generator().manual_seed(seed * 65_537 + index)
        (medium,) = tiny_model.decoders["image"].sample(condition, generators=[noise])
    assert reply.image is not None
    assert (reply.image.to_numpy() == medium.to_numpy()).all()


def test_all_events_go_to_one_sink(tiny_model: AnyToAny) -> None:
    """For several conversations, with their numbers; a sink that raises ends the request."""
    events: list[tuple[int, Event]] = []
    chat = Chat(tiny_model)
    talks = [[user("one")], [user("two")]]
    replies = request_of(
        chat, talks, lambda *event: events.append(event), seeds=[4, 5], max_new_tokens=5
    ).run()
    for number, reply in enumerate(replies):
        own = [event for conversation, event in events if conversation == number]
        text = "".join(event.text for event in own if isinstance(event, TextDelta))
        assert text == reply.text
        progress = [event for event in own if isinstance(event, Progress)]
        assert [(event.step, event.batch_index) for event in progress] == [(1, number), (2, number)]
        (ready,) = [event for event in own if isinstance(event, MediumReady)]
        assert ready.medium is reply.image

    def leaving(conversation: int, event: Event) -> None:
        if isinstance(event, Progress):
            raise ConnectionError("nobody listens")

    with pytest.raises(ConnectionError, match="nobody listens"):
        request_of(chat, talks, leaving, seeds=[4, 5], max_new_tokens=5).run()
    assert chat.engine.is_idle


def test_a_cancel_token_is_set_by_itself_or_by_the_callers_event() -> None:
    event = threading.Event()
    own, others = CancelToken(event), CancelToken(event)
    own.check()
    own.cancel()
    assert own.is_cancelled
    assert not others.is_cancelled
    assert not event.is_set()
    event.set()
    with pytest.raises(Cancelled):
        others.check()
