"""Conversations about scenes: written the same again, answered rightly, nothing held out."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest

from mmllm.config import registry
from mmllm.config.registry import parse_component
from mmllm.conversation import Audio, Image, Medium, Message, Text, Video
from mmllm.errors import ConfigError
from mmllm.mini.world import unknown, wordings
from mmllm.mini.world.change_requests import edit
from mmllm.mini.world.conversations import (
    KINDS,
    Conversations,
    ConversationsConfig,
    accept,
    build,
    converse,
)
from mmllm.mini.world.hearing import replay, sound_of
from mmllm.mini.world.memory import remember
from mmllm.mini.world.rendering import SIDE
from mmllm.mini.world.scenes import Group, Scene
from mmllm.mini.world.sounds import (
    Soundscape,
    Voice,
    describe_soundscape,
    is_training,
    sounds,
)
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import things


def words(message: Message) -> str:
    return " ".join(part.text for part in message.parts if isinstance(part, Text))


@pytest.mark.parametrize("kind", KINDS)
def test_turns_alternate_and_are_written_the_same_again(kind: str) -> None:
    for seed in range(20):
        first, second = (converse(kind, "training", random.Random(seed)).messages for _ in range(2))
        assert [message.role for message in first] == ["user", "assistant"] * (len(first) // 2)
        assert [words(message) for message in first] == [words(message) for message in second]
        for one, other in zip(first, second, strict=True):
            for part, again in zip(one.parts, other.parts, strict=True):
                if isinstance(part, Image | Video):
                    assert isinstance(again, Image | Video)
                    assert part.array is not None
                    assert again.array is not None
                    assert np.array_equal(part.array, again.array)


def test_replies_describe_what_they_draw() -> None:
    for seed in range(50):
        for message in converse("edits", "training", random.Random(seed)).messages:
            if message.role == "assistant":
                image = message.parts[1]
                assert isinstance(image, Image)
                assert image.array is not None
                assert image.array.shape == (SIDE, SIDE, 3)
                assert words(message) in (
                    f"Here is {image.caption}.",
                    f"Here are {image.caption}.",
                )


def exchange(scene: Scene, seed: int) -> tuple[str, str] | None:
    talk = Talk(random.Random(seed), "training")
    talk.scene = scene
    if not edit(talk):
        return None
    return words(talk.messages[0]).lower(), words(talk.messages[1])


def test_edits_change_what_they_name() -> None:
    scene = Scene((Group("cat"), Group("car")), "left")
    seen = set()
    for seed in range(1500):
        written = exchange(scene, seed)
        if not written:
            continue
        asked, reply = written
        if re.search(r"\b(remove|delete|without|get rid of|take out|leave out) the cat\b", asked):
            assert reply == "Here is a car."
            seen.add("remove")
        if asked.startswith(("swap them", "switch places")):
            assert reply == "Here is a car to the left of a cat."
            seen.add("swap")
        if re.fullmatch(r"(now |ok, |and |please )?paint the car red\.?", asked):
            assert reply == "Here is a cat to the left of a red car."
    assert seen == {"remove", "swap"}


def test_heldout_words_are_not_in_training() -> None:
    def vocabulary(split: wordings.Split, count: int) -> str:
        rng = random.Random(0)
        rows = [converse("refuse", split, rng).messages for _ in range(count)]
        return " ".join(words(message) for row in rows for message in row)

    training = vocabulary("training", 600)
    heldout = [word for word in unknown.things() if unknown.is_heldout(word)]
    assert 60 < len(heldout) < len(unknown.things()) - 60
    found = [word for word in heldout if re.search(rf"draw an? {word} yet", training)]
    assert not found


def test_no_wording_is_trained_and_held_out() -> None:
    def check(table: dict) -> int:
        if "training" not in table:
            return sum(map(check, table.values()))
        assert not set(filter(None, table["training"])) & set(filter(None, table["heldout"]))
        assert len(table["training"]) >= len(table["heldout"]) >= 2
        return 1

    assert check(wordings.tables()) > 30


def test_the_nearest_known_thing_exists() -> None:
    names = {thing.label for thing in things().values()}
    assert not set(unknown.things()) & names
    assert set(unknown.things().values()) <= set(things())


def test_typing_keeps_most_words() -> None:
    """Of eleven at most three are mistyped, and one space is lost."""
    rng = random.Random(0)
    text = "Please draw a red cat to the left of two dogs."
    rough = [wordings.roughen(text, rng) for _ in range(200)]
    assert text in rough
    assert any(line.isupper() for line in rough)
    for line in rough:
        kept = set(re.findall(r"\w+", line.lower())) & set(re.findall(r"\w+", text.lower()))
        assert len(kept) >= 11 - 3 - 2


def test_negations_draw_what_is_wanted_and_nothing_else() -> None:
    kinds = set()
    for seed in range(200):
        asked, reply = converse("negate", "training", random.Random(seed)).messages
        caption = words(reply).removeprefix("Here is ").removeprefix("Here are ").rstrip(".")
        if "What shall I draw instead?" in words(reply):
            assert len(reply.parts) == 1
            kinds.add("none")
            continue
        assert isinstance(reply.parts[1], Image)
        assert reply.parts[1].caption == caption
        if found := re.search(
            r"(?:not|but|except|other than|than) (?:a )?(red|blue)\b", words(asked)
        ):
            assert found[1] not in caption
            kinds.add("colour")
    assert kinds == {"none", "colour"}


MADE = [("drew", "a cat"), ("played", "rain"), ("drew", "two dogs")]


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("first", "First I drew a cat."),
        ("second", "Second I played rain."),
        ("before", "Before that I played rain."),
        ("last", "I drew two dogs."),
        ("all", "First I drew a cat, then I played rain, then I drew two dogs."),
        ("how many", "I have made three things."),
    ],
)
def test_memory_tells_what_was_made(kind: str, answer: str) -> None:
    asked = wordings.tables()["memory"][kind]["training"]
    answers = set()
    for seed in range(1200):
        talk = Talk(random.Random(seed), "training")
        talk.made = list(MADE)
        if remember(talk):
            question = words(talk.messages[0]).rstrip(".?!").lower()
            if question in {line.rstrip(".?!").lower() for line in asked}:
                answers.add(words(talk.messages[1]))
    assert answers == {answer}


def test_pictures_are_counted_where_all_are_pictures() -> None:
    talk = Talk(random.Random(1), "training")
    talk.made = [MADE[0], MADE[2]]
    while not (talk.messages and "I have made" in words(talk.messages[-1])):
        remember(talk)
    assert words(talk.messages[-1]) == "I have made two pictures."


def test_an_offer_is_accepted_once() -> None:
    for seed in range(20):
        *_, offered, _, drawn = converse("accept", "training", random.Random(seed)).messages
        named = re.search(r"(?:I know is|Shall I draw) (.*)[.?]", words(offered))
        assert named is not None
        assert named[1] in words(drawn)
    talk = Talk(random.Random(0), "training")
    assert not accept(talk)
    talk.offer = Scene((Group("cat"),))
    assert accept(talk)
    assert not accept(talk)


def test_the_dataset() -> None:
    data = build(ConversationsConfig(count=50, kinds=("draw", "read")), where="data")
    assert len(data) == 50
    rng = np.random.default_rng(0)
    first = data.conversation(3, rng)
    assert [words(m) for m in first] == [words(m) for m in data.conversation(3, rng)]
    assert len({words(data.conversation(i, rng)[0]) for i in range(50)}) > 40
    heldout = Conversations(ConversationsConfig(count=50, split="heldout"))
    assert words(heldout.conversation(3, rng)[0]) != words(first[0])
    assert heldout.name(3) == "heldout 3"


def test_the_dataset_is_a_type_of_the_config() -> None:
    config = parse_component("data", {"type": "scenes", "count": 7, "share": 0.5}, "data.talk")
    assert len(registry.build(config, where="data.talk")) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kinds": ("draw", "sing")},
            r"data.kinds: unknown \['sing'\]; known are draw, single, colour, few, typed",
        ),
        ({"split": "test"}, "data.split: expected training or heldout, got 'test'"),
    ],
)
def test_wrong_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ConversationsConfig(**options), where="data")


def test_sounds_are_named_and_nothing_held_out_is_played() -> None:
    heldout = {
        describe_soundscape(scape)
        for one, other in itertools.permutations(sounds(), 2)
        for layout in ("then", "together")
        if not is_training(scape := Soundscape((Voice(one), Voice(other)), layout))
    }
    played = 0
    for seed in range(300):
        for message in converse("replay", "training", random.Random(seed), targets=False).messages:
            for part in message.parts:
                if isinstance(part, Audio):
                    played += 1
                    assert words(message) == f"Here is the sound of {part.caption}."
                    assert part.caption not in heldout
    assert played > 400
    rows = [
        converse("play", "heldout", random.Random(seed), targets=False).messages
        for seed in range(40)
    ]
    assert any(row[1].parts[1].caption in heldout for row in rows)  # pyright: ignore


def test_a_change_of_sounds_changes_what_it_names() -> None:
    seen = set()
    for seed in range(1200):
        talk = Talk(random.Random(seed), "training", targets=False)
        talk.scape = Soundscape((Voice("cat"),))
        if not replay(talk):
            continue
        asked, reply = (words(message).lower() for message in talk.messages)
        for change in ("loud", "soft", "high", "low"):
            if re.fullmatch(rf"{change}er( please)?\W*", asked):
                assert reply == f"here is the sound of a {change} cat."
                seen.add(change)
        if asked.startswith("play it three times"):
            assert reply == "here is the sound of a cat three times."
            seen.add("times")
    assert seen == {"loud", "soft", "high", "low", "times"}


@pytest.mark.parametrize("kind", KINDS)
def test_without_targets_replies_hold_captions_alone(kind: str) -> None:
    for seed in range(10):
        for message in converse(kind, "training", random.Random(seed), targets=False).messages:
            for part in message.parts:
                if isinstance(part, Medium):
                    is_reply = message.role == "assistant"
                    assert (part.array is None) is is_reply
                    assert (part.caption is None) is not is_reply


def test_what_a_thing_sounds_like_is_a_sound_of_the_world() -> None:
    known = {thing: sound_of(thing) for thing in things()}
    assert known["cat"] == "cat"
    assert known["bell"] == "church-bell"
    assert known["dog"] is None
    assert set(unknown.SOUNDS.values()) <= set(sounds())
    assert not {word.partition(" ")[2] for word in unknown.SOUNDS} & {
        sound.label for sound in sounds().values()
    }
