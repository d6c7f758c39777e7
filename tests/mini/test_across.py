"""Exchanges from one medium to another, two media in a reply, and requests that are misspelled."""

from __future__ import annotations

import json
import random

import pytest

from mmllm.conversation import Audio, Image, Text, Video
from mmllm.mini.world import across, unknown, wordings
from mmllm.mini.world.conversations import converse
from mmllm.mini.world.memory import name_last
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import DATA, things

PROMPTS = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))


def words(parts: tuple) -> list[str]:
    return [part.text for part in parts if isinstance(part, Text)]


def talks(exchange, split: wordings.Split = "training", count: int = 60) -> list[Talk]:
    written = []
    for seed in range(count):
        talk = Talk(random.Random(seed), split, targets=False)
        if exchange(talk):
            written.append(talk)
    assert written
    return written


@pytest.mark.parametrize(
    ("exchange", "shown", "answered"),
    [
        (across.hear_picture, Image, Audio),
        (across.draw_sound, Audio, Image),
        (across.animate_picture, Image, Video),
    ],
)
def test_another_medium_of_the_same_thing_is_answered(exchange, shown, answered) -> None:
    refused = 0
    for talk in talks(exchange):
        asked, reply = talk.messages
        (medium,) = asked.media
        assert isinstance(medium, shown)
        assert medium.array is not None
        if not reply.media:
            assert reply.text.startswith("I do not know what")
            refused += 1
            continue
        (made,) = reply.media
        assert isinstance(made, answered)
        assert made.caption is not None
        assert made.caption in reply.text
    assert (refused > 0) is (exchange is across.hear_picture)
    assert refused < 20


@pytest.mark.parametrize(
    ("exchange", "second", "words_of_it"),
    [
        (across.draw_and_play, Audio, "And here is the sound of "),
        (across.draw_and_animate, Video, "And here is a clip of "),
    ],
)
def test_each_of_two_media_follows_its_sentence(exchange, second, words_of_it: str) -> None:
    for talk in talks(exchange):
        first, image, then, other = talk.messages[1].parts
        assert isinstance(image, Image)
        assert isinstance(other, second)
        assert isinstance(first, Text)
        assert isinstance(then, Text)
        assert first.text.startswith("Here ")
        assert image.caption is not None
        assert image.caption in first.text
        assert then.text == f"{words_of_it}{other.caption}."


def test_pictures_are_of_training_styles() -> None:
    sides = {across.shown(talk, "cat").array.shape for talk in talks(across.hear_picture)}  # pyright: ignore
    assert len(sides) == 2  # of scenes, and of files
    assert set(across.STYLES) == {"fluent-flat", "noto"}


@pytest.mark.parametrize("kind", ["across", "last"])
def test_no_wording_of_the_held_out_prompts_is_trained(kind: str) -> None:
    names = ("picture_to_sound", "sound_to_picture", "picture_to_clip", "what_did_you_draw")
    heldout = {line.lower().rstrip(".?!") for name in names for line in PROMPTS[name]["heldout"]}
    for seed in range(150):
        talk = converse(kind, "training", random.Random(seed), targets=False)
        for message in talk.messages:
            assert not {text.lower().rstrip(".?!") for text in words(message.parts)} & heldout


def test_what_was_made_last_is_named() -> None:
    for verb, named in (("drew", "a cat"), ("played", "rain"), ("animated", "a cat bouncing")):
        talk = Talk(random.Random(0), "training")
        assert not name_last(talk)
        talk.made = [("drew", "a dog"), (verb, named)]
        assert name_last(talk)
        assert words(talk.messages[1].parts) == [f"I {verb} {named}."]


def test_misspelled_requests_are_answered_as_if_they_were_not() -> None:
    """Most say the thing wrongly, none names another thing, known or unknown, by a slip."""
    names = {word for thing in things().values() for word in thing.label.lower().split()}
    names |= {word for name in unknown.things() for word in name.lower().split()}
    slipped = 0
    rng = random.Random(0)
    for thing in list(things().values())[:200]:
        asked = wordings.misspell(f"Draw {thing.caption}.", thing.caption, rng).lower()
        right = set(f"draw {thing.caption}".lower().replace("-", " ").split())
        wrong = set(asked.rstrip(".").replace("-", " ").split()) - right
        slipped += bool(wrong)
        assert not wrong & names
    assert slipped > 140
