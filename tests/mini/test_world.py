"""Scenes of mini's world: what they hold, what is held out, how they look, what they are called."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mmllm.mini.world import edits
from mmllm.mini.world.captions import caption, clip_caption, describe, describe_clip, phrase
from mmllm.mini.world.clips import (
    FRAMES,
    MOTIONS,
    Clip,
    draw_training_clip,
    render_clip,
)
from mmllm.mini.world.edits import EditError
from mmllm.mini.world.rendering import SIDE, place, render
from mmllm.mini.world.scenes import (
    Group,
    Scene,
    combinations,
    draw,
    draw_heldout_scene,
    draw_training_scene,
    is_heldout,
)
from mmllm.mini.world.things import COLOURS, SPRITE, colourable, sprite, things

KINDS = ("thing", "colour", "count", "pair", "pair, colours", "groups", "three", "four")


def hue_of(pixels: np.ndarray) -> str:
    """The colour of COLOURS that the middle of an image is nearest to, by mean RGB."""
    import colorsys

    mean = pixels.reshape(-1, 3).mean(0) / 255
    named = {
        name: np.array(colorsys.hsv_to_rgb(hue / 360, saturation, value))
        for name, (hue, saturation, value) in COLOURS.items()
    }
    return min(named, key=lambda name: float(np.square(named[name] - mean).sum()))


def test_every_thing_has_a_sprite_and_names_of_its_own() -> None:
    owner: dict[str, str] = {}
    for thing in things().values():
        pixels = sprite(thing.id)
        assert pixels.shape == (SPRITE, SPRITE, 4)
        assert 0.05 < (pixels[..., 3] > 0.5).mean() < 1
        for name in (thing.label, *thing.synonyms, *thing.heldout_synonyms):
            assert owner.setdefault(name.lower(), thing.id) == thing.id
    assert len(things()) > 300


def test_at_least_sixty_things_take_every_colour() -> None:
    assert len(colourable()) >= 60
    assert len(COLOURS) >= 8
    for colour in ("red", "green", "blue", "yellow", "purple", "black"):
        circle = render(Scene((Group("circle", colour=colour),)), random.Random(0))
        assert hue_of(circle[56:72, 56:72]) == colour


def test_a_thing_of_many_hues_is_not_recoloured() -> None:
    with pytest.raises(ValueError, match="rainbow has no dominant hue: it cannot be made red"):
        sprite("rainbow", "red")


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(0)
    scenes = [draw_training_scene(rng) for _ in range(2000)]
    assert not any(is_heldout(found) for scene in scenes for found in combinations(scene))
    assert {len(scene.groups) for scene in scenes} == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["colour", "count", "pair", "pair, colours", "groups", "four"])
def test_heldout_scenes_hold_what_training_lacks(kind: str) -> None:
    rng = random.Random(1)
    for _ in range(20):
        scene = draw_heldout_scene(kind, rng)
        assert any(is_heldout(found) for found in combinations(scene))


def test_things_stand_where_the_layout_says() -> None:
    rng = random.Random(2)
    for _ in range(50):
        one, other = (Group(thing) for thing in rng.sample(list(things()), 2))
        left, right = place(Scene((one, other), "left"), rng)
        assert left.x + 20 < right.x
        assert left.thing == one.thing
        high, low = place(Scene((one, other), "above"), rng)
        assert high.y + 20 < low.y
        corners = list(place(Scene((one, other, one, other), "corners"), rng))
        assert [(c.x < 64, c.y < 64) for c in corners] == [
            (True, True),
            (False, True),
            (True, False),
            (False, False),
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_is_a_pure_function_of_its_seed(kind: str) -> None:
    one, two = (random.Random(3), random.Random(3))
    first, second = (render(draw(kind, rng), rng) for rng in (one, two))
    assert first.shape == (SIDE, SIDE, 3)
    assert (first == second).all()
    assert first.std() > 5


def test_four_things_at_most_and_all_inside() -> None:
    rng = random.Random(4)
    for kind in KINDS:
        for _ in range(50):
            placed = list(place(draw(kind, rng), rng))
            assert 1 <= len(placed) <= 4
            for item in placed:
                assert 0 <= item.x <= SIDE
                assert 0 <= item.y <= SIDE


def test_captions() -> None:
    cat, dogs = Group("cat", colour="orange"), Group("dog", count=2)
    assert describe(Scene((cat, dogs), "left")) == "an orange cat to the left of two dogs"
    assert describe(Scene((cat,), "alone", "blue")) == "an orange cat on a blue background"
    assert describe(Scene((Group("grapes", colour="blue"),))) == "some blue grapes"
    assert phrase(Group("pants", colour="red"), random.Random(0)) == "a red pair of pants"
    assert phrase(Group("tooth", count=3, size="small"), random.Random(0)) == "three small teeth"
    assert phrase(Group("ufo"), random.Random(0)) == "a UFO"


def test_heldout_wordings_are_not_those_of_training() -> None:
    scene = Scene((Group("cat"), Group("dog")), "left")
    rng = random.Random(5)
    training = {caption(scene, rng) for _ in range(500)}
    heldout = {caption(scene, rng, "heldout") for _ in range(200)}
    assert len(training) > 20
    assert not training & heldout


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of scene 'five'; known are thing, colour"):
        draw("five", random.Random(0))


CAT, DOG, CAR = Group("cat"), Group("dog"), Group("car")
BOTH = Scene((CAT, DOG), "left")


@pytest.mark.parametrize(
    ("edited", "expected"),
    [
        (edits.recolour(BOTH, 0, "blue"), "a blue cat to the left of a dog"),
        (edits.recolour(Scene((Group("cat", colour="red"),)), 0, None), "a cat"),
        (edits.set_count(BOTH, 1, 3), "a cat to the left of three dogs"),
        (edits.bigger(Scene((CAT,)), 0), "a big cat"),
        (edits.bigger(Scene((Group("cat", size="small"),)), 0), "a cat"),
        (edits.smaller(Scene((CAT,)), 0), "a small cat"),
        (edits.become(Scene((Group("cat", 2, "red"),)), 0, "dog"), "two red dogs"),
        (edits.become(Scene((Group("cat", 2, "red"),)), 0, "rainbow"), "two rainbows"),
        (edits.on_ground(Scene((CAT,)), "black"), "a cat on a black background"),
        (edits.remove(BOTH, 0), "a dog"),
        (edits.remove(Scene((CAT, DOG, CAR), "row"), 1), "a cat to the left of a car"),
        (edits.remove(Scene((CAT, DOG, CAR), "over"), 2), "a cat above a dog"),
        (edits.add(Scene((CAT,)), DOG, "left"), "a dog to the left of a cat"),
        (edits.add(Scene((CAT,)), DOG, "below"), "a cat above a dog"),
        (edits.add(Scene((CAT,)), DOG), "a cat and a dog"),
        (edits.add(BOTH, CAR, "right"), "a cat, a dog and a car in a row"),
        (edits.add(BOTH, CAR, "above"), "a car above a cat and a dog"),
        (edits.swap(BOTH), "a dog to the left of a cat"),
        (edits.move(BOTH, 0, "below"), "a dog above a cat"),
    ],
)
def test_edits(edited: Scene, expected: str) -> None:
    assert describe(edited) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: edits.recolour(Scene((Group("rainbow"),)), 0, "red"), "keeps its colours"),
        (lambda: edits.set_count(Scene((CAT,)), 0, 5), "at most 4 things, not 5"),
        (lambda: edits.set_count(Scene((CAT,)), 0, 0), "at least one thing"),
        (lambda: edits.set_count(Scene((Group("grapes"),)), 0, 2), "grapes cannot be counted"),
        (lambda: edits.remove(Scene((CAT,)), 0), "nothing would be left"),
        (lambda: edits.remove(BOTH, 2), "there is no group 2"),
        (lambda: edits.add(BOTH, CAT), "there is a cat already"),
        (lambda: edits.add(Scene((CAT,)), DOG, "behind"), "unknown place 'behind'"),
        (lambda: edits.add(Scene((CAT, DOG, CAR), "row"), Group("tree")), "at most three groups"),
        (lambda: edits.add(BOTH, CAR, "below"), "a third group can stand left"),
        (lambda: edits.swap(Scene((CAT,))), "two groups can be swapped, not 1"),
        (lambda: edits.bigger(Scene((Group("cat", size="big"),)), 0), "as big as it gets"),
    ],
)
def test_edits_that_cannot_be(change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(EditError, match=message):
        change()


def centre(frame: np.ndarray) -> tuple[float, float, int]:
    """The middle of what is not white, and how many pixels it has."""
    rows, columns = np.nonzero((frame < 250).any(-1))
    return float(columns.mean()), float(rows.mean()), len(rows)


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions(motion: str) -> None:
    frames = render_clip(Clip(Scene((Group("apple"),)), (motion,)), random.Random(0))
    assert frames.shape == (FRAMES, SIDE, SIDE, 3)
    last = centre(frames[-1])
    if motion == "appear":
        assert (frames[0] == 255).all()
        assert last[2] > 1000
        return
    first = centre(frames[0])
    moved = (last[0] - first[0], last[1] - first[1])
    towards = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    if motion in towards:
        across, down = towards[motion]
        assert moved[0] * across + moved[1] * down > 25
    elif motion in ("grow", "shrink"):
        assert (last[2] / first[2] > 2) is (motion == "grow")
    elif motion == "bounce":
        heights = [centre(frame)[1] for frame in frames]
        assert max(heights) - min(heights) > 20
        assert abs(moved[1]) < 3
    else:
        assert np.abs(frames[2].astype(int) - frames[0]).mean() > 3
        assert abs(moved[0]) + abs(moved[1]) < 6


def test_clips_of_training_hold_no_heldout_motion() -> None:
    rng = random.Random(6)
    clips = [draw_training_clip(rng) for _ in range(500)]
    moves = [
        ("motion", motion, group.thing)
        for clip in clips
        for group, motion in zip(clip.scene.groups, clip.motions, strict=True)
        if motion
    ]
    assert not any(map(is_heldout, moves))
    assert {motion for _, motion, _ in moves} == set(MOTIONS)


def test_captions_of_clips() -> None:
    clip = Clip(Scene((CAT, Group("dog", colour="red")), "left"), ("left", None))
    assert describe_clip(clip) == "a cat moving to the left and a red dog"
    rng = random.Random(7)
    one = Clip(Scene((CAT,)), ("spin",))
    training = {clip_caption(one, rng) for _ in range(100)}
    heldout = {clip_caption(one, rng, "heldout") for _ in range(100)}
    assert "a cat spinning" in training
    assert not training & heldout


def test_a_clip_of_many_is_refused() -> None:
    with pytest.raises(ValueError, match="one thing of a kind"):
        render_clip(Clip(Scene((Group("cat", 2),)), ("left",)), random.Random(0))
