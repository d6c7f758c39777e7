"""Scenes of mini's world: what they hold, what is held out, how they look, what they are called."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mmllm.mini.world.captions import caption, describe, phrase
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
