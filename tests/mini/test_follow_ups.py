"""What goes on with what was made last: changes of scenes and clips, and other media of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from mmllm.conversation import Image, Text, Video
from mmllm.mini.world import wordings
from mmllm.mini.world.across import draw_made
from mmllm.mini.world.change_requests import edit
from mmllm.mini.world.clips import Clip
from mmllm.mini.world.conversations import converse
from mmllm.mini.world.motions import change_motion, reverse
from mmllm.mini.world.refusals import refuse_number
from mmllm.mini.world.scenes import Group, Scene
from mmllm.mini.world.sounds import Soundscape, Voice
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import COLOURS, colourable

CAT = Scene((Group("cat"),))
DOG = Scene((Group("dog", colour="red"),))
CATS = Scene((Group("cat", 3),))
BOTH = Scene((Group("cat"), Group("fox")), "left")
TRIES = 2000
SLOTS = {
    "it": "(?:it|them|the (?:cat|fox)s?)",
    "thing": "cat",
    "many": "cats",
    "colour": f"(?:{'|'.join(COLOURS)})",
    "where": "(?:(?:on|to|at) the [a-z]+|.*(?:left|right|above|over|top|below|under|underneath).*)",
}


def written(talk: Talk) -> tuple[str, str]:
    """Request and reply of the first exchange, in small letters."""
    asked, reply = (
        " ".join(part.text for part in message.parts if isinstance(part, Text))
        for message in talk.messages[:2]
    )
    return asked.lower(), reply.lower()


def replies(scene: Scene, kind: str) -> set[str]:
    """What is answered to requests in the training wordings of a kind of change, and no other's."""
    forms = [
        re.sub(r"\\\{(\w+)\\\}", lambda slot: SLOTS[slot[1]], re.escape(form.lower()))
        for form in wordings.tables()["edits"][kind]["training"]
    ]
    found = set()
    for seed in range(TRIES):
        talk = Talk(random.Random(seed), "training", targets=False)
        talk.scene = scene
        if edit(talk):
            asked, reply = written(talk)
            if any(re.fullmatch(rf"{form}[.?!]*", asked) for form in forms):
                found.add(reply)
    return found


@pytest.mark.parametrize(
    ("scene", "kind", "answers"),
    [
        (CAT, "one more", {"here are two cats."}),
        (CATS, "one less", {"here are two cats."}),
        (CATS, "only one", {"here is a cat."}),
        (DOG, "natural", {"here is a dog."}),
        (CATS, "again", {"here are three cats."}),
    ],
)
def test_a_change_leads_to_what_it_names(scene: Scene, kind: str, answers: set[str]) -> None:
    assert replies(scene, kind) == answers


def test_all_groups_take_the_colour() -> None:
    found = replies(BOTH, "recolour all")
    assert len(found) > 3
    for reply in found:
        colours = re.findall(r"an? (\w+) (?:cat|fox)\b", reply)
        assert len(colours) == 2
        assert len(set(colours)) == 1


def test_what_is_moved_stands_there() -> None:
    found = replies(BOTH, "move")
    assert {"here is a fox to the left of a cat.", "here is a cat above a fox."} <= found
    assert "here is a cat to the left of a fox." not in found  # it is there already


def clip_after(change: Callable[[Talk], bool], clip: Clip, seed: int) -> Talk | None:
    """The conversation after a change of a clip; None where it cannot be written."""
    talk = Talk(random.Random(seed), "training", targets=False)
    talk.clip, talk.scene = clip, clip.scene
    return talk if change(talk) else None


def test_a_changed_clip_goes_on_moving_as_it_did() -> None:
    captions: set[str | None] = set()
    for seed in range(400):
        talk = clip_after(edit, Clip(DOG, ("spin",)), seed)
        if talk and isinstance(medium := talk.messages[1].parts[-1], Video):
            captions.add(medium.caption)
            assert talk.clip
            assert talk.clip.motions == ("spin",)
    assert "a dog spinning" in captions
    assert any(re.fullmatch(r"a (?!red)\w+ dog spinning", caption or "") for caption in captions)


def test_a_clip_is_reversed_and_moves_otherwise() -> None:
    clip = Clip(CAT, ("left",))
    turned = clip_after(reverse, clip, 0)
    assert turned
    assert turned.clip == replace(clip, motions=("right",))
    assert clip_after(reverse, Clip(CAT, ("spin",)), 0) is None  # spinning has no opposite
    motions = {
        talk.clip.motions[0]
        for seed in range(100)
        if (talk := clip_after(change_motion, clip, seed)) and talk.clip
    }
    assert "left" not in motions
    assert {"right", "up", "grow"} <= motions


def test_what_moved_or_sounded_is_drawn() -> None:
    talk = clip_after(draw_made, Clip(DOG, ("spin",)), 0)
    assert talk
    assert isinstance(talk.messages[1].parts[-1], Image)
    assert written(talk)[1] == "here is a red dog."
    sounded = Talk(random.Random(0), "training", targets=False)
    sounded.scape = Soundscape((Voice("church-bell"),))
    assert draw_made(sounded)
    assert written(sounded)[1] == "here is a bell."
    assert not draw_made(Talk(random.Random(0), "training", targets=False))


def test_more_than_four_of_what_was_drawn_are_refused() -> None:
    names = set()
    for seed in range(60):
        talk = Talk(random.Random(seed), "training", targets=False)
        talk.scene = CAT
        if refuse_number(talk):
            names.add("cats" in written(talk)[1])
            assert "i can count to four" in written(talk)[1]
    assert names == {True, False}


def test_a_conversation_of_follow_ups_goes_on_with_its_last_medium() -> None:
    for seed in range(60):
        messages = converse("follow", "training", random.Random(seed), targets=False).messages
        assert len(messages) >= 4
        assert all(isinstance(part, Text) for part in messages[-2].parts)  # nothing is shown


@pytest.mark.parametrize("targets", [False, True])
def test_where_nothing_is_rendered_any_thing_is_asked_for_in_any_colour(targets: bool) -> None:
    painted = set()
    for seed in range(300):
        talk = converse("colour", "training", random.Random(seed), targets=targets)
        (scene,) = talk.shown.values()
        assert isinstance(scene, Scene)
        painted.add(scene.groups[0].thing)
    assert (painted <= set(colourable())) is targets
