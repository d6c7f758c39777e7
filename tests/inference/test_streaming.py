"""Streaming, cancelling and the prefix cache: always against the plain way of asking."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mmllm import media
from mmllm.conversation import Image, Medium, Message, Text, assistant, system, user
from mmllm.errors import ConfigError, MediaError
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import generate
from mmllm.inference.chat import Chat
from mmllm.inference.events import Done, Event, MediumReady, MediumStarted, Progress, TextDelta
from mmllm.inference.outputs import GenerationOutput
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.replies import Reply
from mmllm.inference.sampling import Sampling
from mmllm.model import AnyToAny
from tests.inference.comparing import close, same
from tests.inference.prompts import eager
from tests.samples import clip, picture, sound

ALL = {"image": "force", "audio": "force", "video": "force"}
OPTIONS = {"seed": 3, "modalities": ALL, "max_new_tokens": 12, "temperature": 1.0}
PROMPT = [user(picture(40), "what is this? one two three four")]


def test_a_stream_equals_the_reply(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    events = list(chat.stream(PROMPT, **OPTIONS))
    last = events[-1]
    assert isinstance(last, Done)
    assert same(last.reply, Chat(tiny_model).reply(PROMPT, **OPTIONS))

    streamed: dict[int, str | Medium] = {}
    steps: dict[int, list[int]] = {}
    for event in events[:-1]:
        if isinstance(event, TextDelta):
            streamed[event.part_index] = str(streamed.get(event.part_index, "")) + event.text
        elif isinstance(event, MediumStarted):
            steps[event.part_index] = []
        elif isinstance(event, Progress):
            steps[event.part_index].append(event.step)
            assert event.steps == 2
        elif isinstance(event, MediumReady):
            assert steps[event.part_index] == [1, 2]
            streamed[event.part_index] = event.medium
    parts = last.reply.message.parts
    assert [streamed[place] for place in range(len(parts))] == [
        part.text if isinstance(part, Text) else part for part in parts
    ]
    assert len(last.reply.media) == 3

    usage, timings = last.reply.usage, last.reply.timings
    assert usage.prompt == len(tiny_model.renderer.render(PROMPT, add_generation_prompt=True))
    assert (usage.text, usage.signals) == (len(last.reply.ids), 4 + 3 + 5)
    assert 0 < timings.first_token <= timings.text <= timings.total
    assert timings.media.keys() == ALL.keys()


def test_text_goes_on_while_a_medium_is_made(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(eager(tiny_model, "image"))
    decoder, text_came = tiny_model.decoders["image"], threading.Event()
    sample = decoder.sample
    monkeypatch.setattr(
        decoder, "sample", lambda *args, **rest: text_came.wait(60) and sample(*args, **rest)
    )
    kinds: list[type] = []
    for event in chat.stream(PROMPT, seed=3, max_media=1, max_new_tokens=6, temperature=1.0):
        kinds.append(type(event))
        if isinstance(event, TextDelta) and MediumStarted in kinds:
            text_came.set()
    assert TextDelta in kinds[kinds.index(MediumStarted) : kinds.index(Progress)]
    assert kinds[-2:] == [MediumReady, Done]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_decoders_work_side_by_side_on_a_cpu_and_in_turn_on_an_accelerator(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    made = Chat(tiny_model).reply(PROMPT, **OPTIONS).media
    active, most = set[str](), [0]
    both = threading.Barrier(3)

    def sampler(key: str, medium: Medium) -> Callable[..., list[Medium]]:
        def sample(*_: object, **__: object) -> list[Medium]:
            active.add(key)
            if device == "cpu":
                both.wait(30)  # until all three are here
            most[0] = max(most[0], len(active))
            time.sleep(0.02)
            active.remove(key)
            return [medium]

        return sample

    for key, medium in zip(("image", "audio", "video"), made, strict=True):
        decoder = tiny_model.decoders[key]
        assert decoder.modality == medium.modality
        monkeypatch.setattr(type(decoder), "device", torch.device(device))
        monkeypatch.setattr(decoder, "sample", sampler(key, medium))
    reply = Chat(tiny_model).reply(PROMPT, **OPTIONS)
    assert [medium.modality for medium in reply.media] == [medium.modality for medium in made]
    assert most[0] == (3 if device == "cpu" else 1)


def test_previews_change_nothing_but_the_events(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model, prefixes=0)
    options = {**OPTIONS, "decoders": {"image": {"steps": 8}}}
    plain, shown = (list(chat.stream(PROMPT, previews=on, **options)) for on in (False, True))
    assert same(plain[-1].reply, shown[-1].reply)
    previews = {
        (e.modality, e.step): e.preview for e in shown if isinstance(e, Progress) and e.preview
    }
    assert previews.keys() == {("image", 2), ("image", 4), ("image", 6)}
    assert previews["image", 2].to_numpy().shape == (16, 16, 3)
    assert not any(isinstance(e, Progress) and e.preview for e in plain)


# --- cancelling ---------------------------------------------------------------------------------


def until(events, kind: type, count: int = 1) -> Event:
    """The event of the `count`-th time that `kind` comes."""
    for event in events:
        count -= isinstance(event, kind)
        if count == 0:
            return event
    raise AssertionError(f"the stream ended without {kind.__name__}")


@pytest.mark.parametrize(
    ("kind", "count"), [(TextDelta, 1), (TextDelta, 3), (MediumStarted, 1), (Progress, 4)]
)
@pytest.mark.parametrize("handle", [False, True])
def test_a_cancelled_stream_leaves_the_engine_idle_and_unchanged(
    tiny_model: AnyToAny, kind: type, count: int, handle: bool
) -> None:
    chat = Chat(tiny_model)
    options = {**OPTIONS, "decoders": {key: {"steps": 40} for key in ALL}}
    expected = chat.reply(PROMPT, **OPTIONS)
    cancel = threading.Event()
    events = chat.stream(PROMPT, cancel=cancel, **options)
    until(events, kind, count)
    if handle:
        cancel.set()
        assert not any(isinstance(event, Done) for event in events)
    else:
        events.close()
    assert chat.engine.is_idle
    assert close(chat.reply(PROMPT, **OPTIONS), expected)


def test_cancelled_streams_leave_no_thread_and_no_tensor(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model, prefixes=1)

    def ask(kind: type, count: int) -> None:
        events = chat.stream(PROMPT, **OPTIONS)
        until(events, kind, count)
        events.close()

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        return threading.active_count(), len(tensors)

    def cancel_often(times: int) -> tuple[int, int]:
        for _ in range(times):
            ask(TextDelta, 2)
            ask(Progress, 3)
        ask(Done, 1)
        return held()

    once = cancel_often(1)  # what the first replies make and keep is there now
    assert cancel_often(5) == once


def test_errors_are_raised_in_the_stream(tiny_model: AnyToAny, tmp_path: Path) -> None:
    chat = Chat(tiny_model)
    with pytest.raises(ConfigError, match="unknown modality 'smell'"):
        list(chat.stream(PROMPT, modalities={"smell": "force"}))
    path = picture(40).save(tmp_path / "large.png")
    with media.limits(pixels=4), pytest.raises(MediaError, match="limit of 4"):
        list(chat.stream([user(Image(path), "what is this?")]))
    assert chat.engine.is_idle


def test_concurrent_streams_equal_single_replies(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    expected = [chat.reply(PROMPT, **{**OPTIONS, "seed": seed}) for seed in range(3)]
    replies: dict[int, Reply] = {}

    def ask(seed: int) -> None:
        replies[seed] = list(chat.stream(PROMPT, **{**OPTIONS, "seed": seed}))[-1].reply

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    waiting = threading.Event()
    waiting.set()  # cancelled before its turn: it need not wait for the others
    assert list(chat.stream(PROMPT, cancel=waiting)) == []
    for thread in threads:
        thread.join()
    assert all(close(replies[seed], expected[seed]) for seed in range(3))


# --- options ------------------------------------------------------------------------------------


def test_text_ends_before_a_stop_string(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model)
    options = {**OPTIONS, "modalities": {"image": "force", "audio": "forbid", "video": "forbid"}}
    whole = chat.reply(PROMPT, **options)
    text = whole.message.parts[0].text
    stop = text[4:7]
    end = text.index(stop)
    events = list(chat.stream(PROMPT, stop=["never written", stop], **options))
    reply = events[-1].reply
    assert reply.finish == "stop"
    assert reply.message.parts[0] == Text(text[:end])
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == text[:end]
    assert whole.ids[: len(reply.ids)] == reply.ids
    assert len(reply.ids) < len(whole.ids)
    assert len(reply.media) == 1, "what is forced is still made"
    assert list(chat.stream(PROMPT, stop=stop, **options))[-1].reply.ids == reply.ids
    for wrong in (7, [""]):
        with pytest.raises(ConfigError, match="stop: expected a list"):
            chat.reply(PROMPT, stop=wrong)


def test_options_of_decoders_hold_for_one_request(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model, prefixes=0)
    plain = chat.reply(PROMPT, **OPTIONS)
    decoders = {
        "image": {"steps": 3, "guidance": 2.0, "negative_prompt": "a red apple ."},
        "audio": {"steps": 3, "seconds": 0.1},
        "video": {"frames": 9, "height": 32, "width": 16, "fps": 2.0},
    }
    changed = chat.reply(PROMPT, decoders=decoders, **OPTIONS)
    image, sound_, clip_ = (
        {m.modality: m for m in changed.media}[key] for key in ("image", "audio", "video")
    )
    assert (image.to_numpy() != plain.media[0].to_numpy()).any()
    assert sound_.to_numpy().shape == (1, 800)
    assert (clip_.to_numpy().shape, clip_.fps) == ((9, 32, 16, 3), 2.0)
    assert same(chat.reply(PROMPT, **OPTIONS), plain)

    free = {"image": {"negative_prompt": "blue", "guidance": 3.0}}
    other = chat.reply(PROMPT, decoders=free, **OPTIONS)
    assert (other.media[0].to_numpy() != plain.media[0].to_numpy()).any()


@pytest.mark.parametrize(
    ("modality", "given", "message"),
    [
        ("image", {"seconds": 3}, "image: unknown option 'seconds'; this decoder takes steps"),
        ("image", {"steps": 1}, "steps: expected at least 2"),
        ("image", {"negative_prompt": "x", "guidance": 1}, "does nothing at guidance 1"),
        ("audio", {"seconds": 99.0}, "seconds: expected at most 0.256"),
        ("video", {"frames": 6}, "5 would do"),
        ("video", {"fps": 0}, "fps: expected more than 0"),
        ("smell", {"steps": 3}, "unknown modality 'smell'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_computed(
    tiny_model: AnyToAny, modality: str, given: dict, message: str
) -> None:
    tiny_model.llm.forward = None
    with pytest.raises(ConfigError, match=message):
        Chat(tiny_model).reply(PROMPT, decoders={modality: given})


# --- the prefix cache ---------------------------------------------------------------------------


def talk(chat: Chat, turns: Sequence[Message], **options) -> list[Reply]:
    """The replies to turns that are sent one after the other."""
    conversation: list[Message] = []
    replies = []
    for number, turn in enumerate(turns):
        conversation.append(turn)
        replies.append(chat.reply(conversation, seed=number, **options))
        conversation.append(replies[-1].message)
    return replies


TURNS = [
    user(picture(40), "what is this?"),
    user("draw it", sound(0.2)),
    user("and now?"),
    user(clip(80), "one", picture(90)),
]


def test_later_turns_compute_only_what_is_new_and_give_the_same(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"modalities": {"image": "force"}, "max_new_tokens": 5, "temperature": 1.0}
    plain = talk(Chat(tiny_model, prefixes=0), TURNS, **options)
    prefix_len = len(tiny_model.renderer.prefix_ids)
    assert {reply.usage.cached for reply in plain} <= {0, prefix_len}

    encoded: list[str] = []
    for key, encoder in tiny_model.encoders.items():
        preprocess = encoder.preprocess
        monkeypatch.setattr(
            encoder,
            "preprocess",
            lambda medium, key=key, do=preprocess: encoded.append(key) or do(medium),
        )
    widths: list[int] = []
    forward = tiny_model.llm.forward
    tiny_model.llm.forward = lambda embeds, **rest: (
        widths.append(embeds.shape[1]) or forward(embeds, **rest)
    )
    cached = talk(Chat(tiny_model, prefixes=4), TURNS, **options)
    assert all(close(one, other) for one, other in zip(plain, cached, strict=True))
    # Each medium once: those that were given, and the three pictures that were shown again.
    assert sorted(encoded) == ["audio", "image", "image", "image", "image", "image", "video"]
    for before, reply in pairwise(cached):
        assert reply.usage.cached >= before.usage.prompt  # random text may be spelt otherwise
        assert reply.usage.prompt == plain[cached.index(reply)].usage.prompt
    rest = [reply.usage.prompt - reply.usage.cached for reply in cached]
    assert [width for width in widths if width > 5] == [prefix_len, *rest]


def test_states_after_a_cached_prefix_are_those_without(tiny_model: AnyToAny) -> None:
    prefixes = PrefixCache()
    work = FeatureCache(tiny_model)
    settings = Sampling(max_new_tokens=4, modalities=ALL)
    for conversation in (TURNS[:1], [*TURNS[:1], assistant("one two"), *TURNS[1:2]]):
        prompt = tiny_model.renderer.render(conversation, add_generation_prompt=True)
        (cached,) = generate(tiny_model, [prompt], work, sampling=settings, prefix_cache=prefixes)
        (plain,) = generate(tiny_model, [prompt], work, sampling=settings)
        assert cached.ids == plain.ids
        for one, other in zip(cached.spans, plain.spans, strict=True):
            assert torch.allclose(one.states, other.states, atol=1e-4)
    assert cached.num_cached > 10


def test_the_shared_prefix_is_computed_once_for_all_requests(
    make_model: Callable[..., AnyToAny],
) -> None:
    model = make_model()
    model.llm.attach_lora()
    prefix = model.renderer.prefix_ids
    talks = [[user("one")], [user(picture(40))], [system("Say no."), user("one")]]
    prompts = [model.renderer.render(talk, add_generation_prompt=True) for talk in talks]
    assert [prompt.ids[: len(prefix)] == prefix for prompt in prompts] == [True, True, False]

    work, prefixes = FeatureCache(model), PrefixCache(0)
    settings = Sampling(max_new_tokens=4, modalities=ALL)

    def answers(*numbers: int, by: PrefixCache | None = None) -> list[GenerationOutput]:
        chosen = [prompts[number] for number in numbers]
        return generate(model, chosen, work, sampling=settings, prefix_cache=by)

    def alike(one: GenerationOutput, other: GenerationOutput, atol: float = 1e-4) -> bool:
        return one.ids == other.ids and all(
            torch.allclose(a.states, b.states, rtol=0, atol=atol)
            for a, b in zip(one.spans, other.spans, strict=True)
        )

    (first,) = answers(0, by=prefixes)
    assert first.num_cached == len(prefix)
    answers(2, by=prefixes)
    answers(0, 1, by=prefixes)
    (again,) = answers(0, by=prefixes)
    assert alike(first, again, atol=0), "the same bytes, whatever was asked before"
    kinds = (0,), (1,), (0, 1), (0, 2)
    for change in (lambda: None, lambda: model.llm.model.get_input_embeddings().weight.mul_(0.5)):
        with torch.no_grad():
            change()
        for numbers in kinds:
            found, plain = answers(*numbers, by=prefixes), answers(*numbers)
            assert all(alike(one, other) for one, other in zip(found, plain, strict=True))
    with torch.no_grad():
        for name, weight in model.llm.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    (adapted,) = answers(0, by=prefixes)
    assert alike(adapted, *answers(0))
    with model.llm.model.disable_adapter():
        (bare,) = answers(0, by=prefixes)
        assert alike(bare, *answers(0))
    assert not alike(bare, adapted)


def test_the_prefix_cache_distinguishes_media_and_text(
    make_model: Callable[..., AnyToAny], tmp_path: Path
) -> None:
    """Another picture in the same place, another picture in the same file, an edited question."""
    model = make_model()
    chat, plain = Chat(model, prefixes=4), Chat(model)
    path = tmp_path / "picture.png"
    asked = [
        [user(picture(40), "what is this?")],
        [user(picture(90), "what is this?")],
        [user(picture(90), "what was this?")],
        [user(Image(picture(40).save(path)), "what is this?")],
    ]
    replies = [chat.reply(entry, seed=0, max_new_tokens=6) for entry in asked]
    for entry, reply in zip(asked, replies, strict=True):
        assert close(reply, plain.reply(entry, seed=0, max_new_tokens=6))
    again = chat.reply(asked[0], seed=0, max_new_tokens=6)
    assert again.usage.cached == again.usage.prompt - 1, "another try prefills one position"

    Image.from_numpy(np.zeros((8, 9, 3), np.uint8)).save(path)
    fresh = chat.reply(asked[3], seed=0, max_new_tokens=6)
    assert fresh.usage.cached < replies[3].usage.prompt - 4
    assert close(fresh, plain.reply(asked[3], seed=0, max_new_tokens=6))


def test_as_many_conversations_are_kept_as_was_configured(tiny_model: AnyToAny) -> None:
    chat = Chat(tiny_model, prefixes=2)
    for text in ("one", "two", "three"):
        chat.reply([user(text)], seed=0, max_new_tokens=2)
    kept = chat.engine.prefix_cache.entries
    assert len(kept) == 2
    conversation = [user("three"), assistant("x"), user("four")]
    chat.reply(conversation, seed=0, max_new_tokens=2)
    assert len(chat.engine.prefix_cache.entries) == 2
    assert len(Chat(tiny_model, prefixes=0).engine.prefix_cache.entries) == 0
