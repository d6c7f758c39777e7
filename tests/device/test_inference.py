"""Replies on the second device: the words and the media of the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmllm
from mmllm import checkpoints, config, model
from mmllm.conversation import Conversation, Medium, assistant, user
from mmllm.decoders.contract import Cancelled
from mmllm.demo.replying import stream_reply
from mmllm.demo.sessions import BrowserSession, Turn
from mmllm.inference.chat import Chat
from mmllm.inference.events import Done, MediumReady, Progress
from mmllm.inference.replies import Reply
from mmllm.model import AnyToAny
from tests import parts, second_device
from tests.decoders import tiny
from tests.second_device import host_waits
from tests.server.conftest import running

ALL: dict[str, Any] = {"image": "force", "audio": "force", "video": "force"}
NONE: dict[str, Any] = dict.fromkeys(ALL, "forbid")
SEEN = [tiny.medium(modality) for modality in ALL]
FEW: dict[str, Any] = {modality: {"steps": 2} for modality in ALL}


@pytest.fixture(scope="module", autouse=True)
def _device() -> Iterator[None]:
    with second_device.inference_as_no_grad():
        yield


def alike(one: Reply, other: Reply) -> None:
    """Ids equal; media equal to 1e-4, and a level of a byte where they are bytes."""
    assert one.ids == other.ids
    assert one.finish == other.finish
    assert [medium.modality for medium in one.media] == [medium.modality for medium in other.media]
    for here, there in zip(one.media, other.media, strict=True):
        media_alike(here, there)


def media_alike(one: Medium, other: Medium) -> None:
    left, right = one.to_numpy(), other.to_numpy()
    assert left.shape == right.shape
    if left.dtype == np.uint8:
        difference = np.abs(left.astype(int) - right.astype(int))
        assert difference.max() <= 1
        assert difference.mean() < 0.01
    else:
        np.testing.assert_allclose(left, right, atol=1e-4)


# --- mini ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minis() -> tuple[Chat, Chat]:
    here, there = (mmllm.load("mini", device=name, dtype="float32") for name in ("cpu", "second"))
    assert there.model.device == second_device.DEVICE
    assert {decoder.device.type for decoder in there.model.decoders.values()} == {"second"}
    return here, there


def test_mini_makes_every_medium_and_words(minis: tuple[Chat, Chat]) -> None:
    here, there = (
        chat.reply(
            [user("Draw a red apple.")],
            seed=0,
            modalities=ALL,
            max_new_tokens=6,
            decoders=FEW,
        )
        for chat in minis
    )
    alike(here, there)
    assert [medium.modality for medium in there.media] == list(ALL)
    assert there.text


def test_mini_reads_every_medium(minis: tuple[Chat, Chat]) -> None:
    talk = [user(*SEEN, "What do you see and hear?")]
    here, there = (chat.reply(talk, seed=0, modalities=NONE, max_new_tokens=5) for chat in minis)
    alike(here, there)
    assert len(there.ids) == 5


def test_mini_draws_words_by_chance_and_again_with_its_turns(minis: tuple[Chat, Chat]) -> None:
    """With a kept conversation: a second turn computes what is new."""
    options = {"seed": 3, "temperature": 1.0, "top_p": 0.9, "modalities": NONE, "max_new_tokens": 4}
    replies = []
    for chat in minis:
        keeping = Chat(chat.model, prefixes=1)
        first = keeping.reply([user("Hello!")], **options)
        talk = [user("Hello!"), first.message, user("And now?")]
        with host_waits() as waits:
            second = keeping.reply(talk, **options)
        replies.append((first, second, waits.total()))
    for one, other in zip(*(pair[:2] for pair in replies), strict=True):
        assert one.ids == other.ids
        assert one.usage == other.usage
    assert replies[1][1].usage.cached > replies[1][0].usage.cached
    assert replies[1][2] <= len(replies[1][1].ids) + 2  # and the end, and what is read


def test_mini_answers_eight_at_once_with_forced_and_forbidden_media(
    minis: tuple[Chat, Chat],
) -> None:
    asked = [
        f"Draw a {name}."
        for name in ["apple", "cat", "dog", "bell", "guitar", "rocket", "star", "heart"]
    ]
    options: dict[str, Any] = {
        "seeds": range(8),
        "modalities": {"image": "force", "audio": "forbid"},
        "max_new_tokens": 6,
        "decoders": FEW,
    }
    here, there = (chat.reply_many(asked, **options) for chat in minis)
    for one, other in zip(here, there, strict=True):
        alike(one, other)
        assert other.image is not None


def test_mini_goes_on_for_three_turns_and_starts_from_its_picture(
    minis: tuple[Chat, Chat],
) -> None:
    found = []
    for chat in minis:
        talk = Chat(chat.model, prefixes=2).conversation()
        options: dict[str, Any] = {"seed": 5, "max_new_tokens": 12, "decoders": FEW}
        replies = [talk.reply("Draw a red apple.", **options)]
        assert replies[0].image is not None
        replies.append(talk.reply("What did you draw?", **options))
        options["decoders"] = {"image": {"steps": 4, "init_media": "last", "strength": 0.5}}
        replies.append(talk.reply("Draw a cat.", modalities=["image"], **options))
        found.append(replies)
    for one, other in zip(*found, strict=True):
        alike(one, other)
        assert one.usage == other.usage
    assert found[1][2].usage.cached > found[1][1].usage.cached > 0


def test_mini_streams_with_previews_until_it_is_cancelled(minis: tuple[Chat, Chat]) -> None:
    here, there = minis
    options: dict[str, Any] = {"seed": 1, "max_new_tokens": 12, "decoders": FEW}
    events = list(there.stream("Draw a red apple.", previews=True, **options))
    assert any(isinstance(event, Progress) and event.preview is not None for event in events)
    assert isinstance(events[-1], Done)
    alike(here.reply("Draw a red apple.", **options), events[-1].reply)
    stream = there.stream("Draw a red apple.", **options)
    next(event for event in stream if isinstance(event, Progress))
    stream.close()
    assert there.engine.is_idle
    alike(here.reply("Hello!", **options), there.reply("Hello!", **options))


def test_merged_and_exported_minis_read_and_draw(minis: tuple[Chat, Chat], tmp_path: Path) -> None:
    source = checkpoints.open_checkpoint("mini")
    checkpoints.merge(source, tmp_path / "merged", dtype=torch.float32)
    checkpoints.export(source, tmp_path / "exported", dtype=torch.float32)
    options: dict[str, Any] = {"seed": 1, "max_new_tokens": 6, "decoders": FEW}
    for name in ("merged", "exported"):
        here, there = (
            mmllm.load(tmp_path / name, device=device, dtype="float32")
            for device in ("cpu", "second")
        )
        for asked in ("Draw a red apple.", [user("What is this?", SEEN[0])]):
            alike(here.reply(asked, **options), there.reply(asked, **options))


def test_mini_is_evaluated(minis: tuple[Chat, Chat], monkeypatch: pytest.MonkeyPatch) -> None:
    from mmllm.evaluation import evaluate, perplexity, runner

    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 2
    values, token_nll = [], []
    for chat in minis:
        monkeypatch.setattr(runner, "load", lambda _name, chat=chat: chat)
        report = evaluate("mini", tasks=["routing/text"], limit=1)
        values.append([metric.value for metric in report.metrics])
        measured = perplexity.measure(chat.model, text, window=16, num_windows=1)
        token_nll.append((measured.adapted, measured.base))
    assert values[0] == values[1]
    assert len(values[0]) == 1
    assert token_nll[1] == pytest.approx(token_nll[0], rel=1e-4)


# --- the tiny system ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(system_tree: dict) -> Callable[[str], AnyToAny]:
    """The tiny system with adapters that do something."""

    def built(device: str) -> AnyToAny:
        made = model.build(config.parse_system(system_tree), device=device)
        made.llm.attach_lora()
        generator = torch.Generator().manual_seed(1)
        for _, weight in made.llm.lora_parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.1
            weight.data.copy_(noise)
        return made.to(device).eval()

    return built


@pytest.fixture(scope="module")
def tinies(build: Callable[[str], AnyToAny]) -> tuple[Chat, Chat]:
    return Chat(build("cpu")), Chat(build("second"))


TALKS: list[Conversation] = [
    [user("hello world")],
    [user(SEEN[0], "What is this?")],
    [user(SEEN[1], "and this sound?"), assistant("a violin"), user("Draw it.")],
    [user(SEEN[2], SEEN[0], "one two three")],
    [user("hello world")],
    [user("Here is a clip of a rocket.")],
    [user("one two"), assistant("three", SEEN[0]), user("four five six")],
    [user("Draw a red apple, please.")],
]


def test_a_batch_of_eight(tinies: tuple[Chat, Chat]) -> None:
    options = {
        "seeds": list(range(8)),
        "modalities": {"image": "force", "audio": "forbid"},
        "max_new_tokens": 6,
        "temperature": 1.0,
    }
    here, there = (chat.reply_many(TALKS, **options) for chat in tinies)
    for one, other in zip(here, there, strict=True):
        alike(one, other)
    assert {medium.modality for reply in there for medium in reply.media} >= {"image"}
    assert not any(medium.modality == "audio" for reply in there for medium in reply.media)


def test_a_stream_with_previews_and_one_that_is_cancelled(tinies: tuple[Chat, Chat]) -> None:
    _, chat = tinies
    options: dict[str, Any] = {
        "seed": 0,
        "modalities": {"image": "force", "audio": "forbid", "video": "forbid"},
        "max_new_tokens": 4,
        "decoders": {"image": {"steps": 4}},
        "previews": True,
    }
    events = list(chat.stream(TALKS[0], **options))
    shown = [event for event in events if isinstance(event, Progress)]
    assert any(event.preview is not None for event in shown)
    assert isinstance(events[-1], Done)
    (whole,) = [event.medium for event in events if isinstance(event, MediumReady)]
    cancel = threading.Event()
    seen = []
    for event in chat.stream(TALKS[0], cancel=cancel, **options):
        seen.append(event)
        if isinstance(event, Progress):
            cancel.set()
    assert not any(isinstance(event, Done | MediumReady) for event in seen)
    assert chat.engine.is_idle
    again = chat.reply(TALKS[0], **{k: v for k, v in options.items() if k != "previews"})
    assert (again.media[0].to_numpy() == whole.to_numpy()).all()
    with pytest.raises(Cancelled):
        chat.reply(TALKS[0], cancel=cancel, seed=0)


def test_a_medium_starts_from_the_last_one(tinies: tuple[Chat, Chat]) -> None:
    options: dict[str, Any] = {
        "seed": 1,
        "modalities": {"image": "force", "audio": "forbid", "video": "forbid"},
        "max_new_tokens": 3,
        "decoders": {"image": {"init_media": "last", "strength": 0.6, "steps": 5}},
    }
    here, there = (chat.reply(TALKS[1], **options) for chat in tinies)
    alike(here, there)
    plain = {**options, "decoders": {"image": {"steps": 5}}}
    alone = tinies[1].reply(TALKS[1], **plain)
    assert (alone.media[0].to_numpy() != there.media[0].to_numpy()).any()


def test_later_turns_with_kept_prefixes(tinies: tuple[Chat, Chat]) -> None:
    found = []
    for chat in tinies:
        keeping, talk, replies = Chat(chat.model, prefixes=2), [*TALKS[3]], []
        for _ in range(3):
            wishes = {"image": "force", "audio": "forbid", "video": "forbid"}
            replies.append(keeping.reply(talk, seed=2, max_new_tokens=4, modalities=wishes))
            talk = [*talk, replies[-1].message, user("and now?")]
        found.append(replies)
    for one, other in zip(*found, strict=True):
        alike(one, other)
        assert one.usage == other.usage
    cached = [reply.usage.cached for reply in found[1]]
    assert cached == sorted(set(cached))


def test_merged_and_exported_models_read_and_draw(
    build: Callable[[str], AnyToAny], tmp_path: Path
) -> None:
    checkpoints.save(tmp_path / "trained", build("cpu"), step=1)
    source = checkpoints.open_checkpoint(tmp_path / "trained")
    checkpoints.merge(source, tmp_path / "merged", dtype=torch.float32)
    checkpoints.export(source, tmp_path / "exported", dtype=torch.float32)
    options: dict[str, Any] = {
        "seed": 1,
        "modalities": {"image": "force", "audio": "forbid", "video": "forbid"},
        "max_new_tokens": 5,
    }
    wanted = mmllm.load(tmp_path / "trained", device="cpu", dtype="float32").reply(
        TALKS[1], **options
    )
    for name in ("trained", "merged", "exported"):
        chat = mmllm.load(tmp_path / name, device="second", dtype="float32")
        alike(wanted, chat.reply(TALKS[1], **options))


def test_a_model_that_was_made_there_is_saved_as_one_of_the_cpu(
    build: Callable[[str], AnyToAny], tmp_path: Path
) -> None:
    folders = [checkpoints.save(tmp_path / name, build(name), step=1) for name in ("cpu", "second")]
    first, second = (
        {
            file.relative_to(folder): file.read_bytes()
            for file in sorted(folder.rglob("*.safetensors"))
        }
        for folder in folders
    )
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first)


def test_the_server_and_the_demo_give_what_python_gives(
    tinies: tuple[Chat, Chat], tmp_path: Path
) -> None:
    from mmllm.server.app import build_app

    here, there = tinies
    options: dict[str, Any] = {"seed": 5, "modalities": ALL, "max_new_tokens": 3}
    wanted = here.reply(TALKS[0], **options)
    session = BrowserSession("x", tmp_path)
    session.turns = [Turn(message) for message in TALKS[0]]
    list(stream_reply(there, session, options))
    made = session.turns[-1].message
    assert made.text == wanted.text
    for one, other in zip(wanted.media, made.media, strict=True):
        if one.modality != "video":  # its file is not the frames
            media_alike(one, other)
    with running(build_app(there)) as served, served.openai() as client:
        body = {"seed": 5, "modalities": ALL}
        completion = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello world"}],
            max_tokens=3,
            extra_body=body,
        )
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert wanted.text in str(completion.choices[0].message.model_dump())


def test_a_model_that_is_spread_over_devices(system_tree: dict, tmp_path: Path) -> None:
    """As accelerate's hooks spread one: its embedding, last layers, norm and head are elsewhere."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    weights = str(parts.write_llm(tmp_path / "llm", tied=False))
    tree = {**system_tree, "llm": {**system_tree["llm"], "weights": weights}}
    here, there = (
        model.build(config.parse_system(tree), device=device).eval() for device in ("cpu", "second")
    )
    decoder = there.llm.backbone
    ends = decoder.norm, there.llm.base_model.lm_head
    for part in (decoder.embed_tokens, decoder.layers[1], *ends):
        part.to("cpu")
        add_hook_to_module(part, AlignDevicesHook(execution_device="cpu"))
    options: dict[str, Any] = {
        "modalities": {"image": "force", "audio": "forbid", "video": "forbid"},
        "max_new_tokens": 5,
        "temperature": 1.0,
    }
    for talks in (TALKS[:3], TALKS[1:2]):
        seeds = list(range(len(talks)))
        wanted = Chat(here).reply_many(talks, seeds=seeds, **options)
        found = Chat(there).reply_many(talks, seeds=seeds, **options)
        for one, other in zip(wanted, found, strict=True):
            alike(one, other)
