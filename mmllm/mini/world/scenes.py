"""Descriptions of scenes, drawn at random; which combinations are held out.

A scene holds one to four groups, each of one to four things of a kind, at most four things in all.
Some pairs of things, colours of a thing and numbers of a thing are held out: no scene for training
contains them, in no part of mini (codec, decoders, projections, language model).
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mmllm.mini.world.things import COLOURS, colourable, things

Layout = Literal["alone", "left", "above", "pair", "row", "over", "corners"]
"""How groups stand, in the order of `Scene.groups`:

alone: one group. left: the first left of the second. above: the first above the second.
pair: two side by side, in either order. row: three from left to right.
over: the first above two others. corners: the first two above the last two.
"""
Size = Literal["small", "big"]

MOST = 4
"""Things in a scene, at most."""

GROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "grey": (0.80, 0.80, 0.82),
    "black": (0.10, 0.10, 0.12),
    "blue": (0.66, 0.83, 0.98),
    "green": (0.68, 0.90, 0.66),
    "yellow": (1.0, 0.93, 0.62),
    "pink": (1.0, 0.80, 0.88),
}
"""Backgrounds as RGB in 0..1."""


@dataclass(frozen=True)
class Group:
    """Some things of one kind."""

    thing: str
    count: int = 1
    colour: str | None = None
    """One of COLOURS, or None for the colours that the thing has."""
    size: Size | None = None


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    groups: tuple[Group, ...]
    layout: Layout = "alone"
    ground: str | None = None
    """One of GROUNDS if it is mentioned; None: white, or grey under white things."""


Combination = tuple[str, ...]


def combinations(scene: Scene) -> Iterator[Combination]:
    """What a scene combines: pairs of things, colours of things, numbers of things."""
    for group in scene.groups:
        if group.colour:
            yield ("colour", group.colour, group.thing)
        if group.count > 1:
            yield ("count", str(group.count), group.thing)
    for one, other in itertools.combinations(sorted({g.thing for g in scene.groups}), 2):
        yield ("pair", one, other)


def is_heldout(combination: Combination) -> bool:
    """Whether training never sees a combination: one in ten, chosen by its CRC-32."""
    return zlib.crc32("|".join(combination).encode()) % 10 == 0


def is_training(scene: Scene) -> bool:
    """Whether a scene holds no held-out combination."""
    return not any(map(is_heldout, combinations(scene)))


# Share of the kinds of scenes in training, by what they ask of a model.
_KINDS = {
    "thing": 0.16,
    "colour": 0.15,
    "count": 0.15,
    "pair": 0.20,
    "pair, colours": 0.16,
    "groups": 0.06,
    "three": 0.07,
    "four": 0.05,
}


def draw_training_scene(rng: random.Random) -> Scene:
    """A scene without held-out combinations, its kind drawn by a fixed mixture."""
    kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    while True:
        scene = draw(kind, rng)
        if is_training(scene):
            return scene


def draw_heldout_scene(kind: str, rng: random.Random) -> Scene:
    """A scene of a kind whose every pair, colour and number (whichever it has) is held out.

    In scenes of more than two groups, one held-out combination is enough.
    """
    while True:
        scene = draw(kind, rng)
        found = [is_heldout(combination) for combination in combinations(scene)]
        if any(found) and (all(found) or len(scene.groups) > 2):
            return scene


def draw(kind: str, rng: random.Random) -> Scene:
    """A scene of a kind, held out or not.

    Args:
        kind: "thing", "colour", "count", "pair", "pair, colours", "groups", "three" or "four".
        rng: Where chance comes from.

    Raises:
        ValueError: If the kind is unknown.
    """
    ground = rng.choice(list(GROUNDS)) if rng.random() < 0.15 else None
    if kind == "thing":
        size: Size | None = rng.choice(("small", "big")) if rng.random() < 0.25 else None
        return Scene((Group(rng.choice(list(things())), size=size),), "alone", ground)
    if kind == "colour":
        return _visible(Scene((_coloured(rng),), "alone", ground))
    if kind == "count":
        group = _counted(rng, rng.randint(2, 4))
        if rng.random() < 0.25 and group.thing in colourable():
            group = replace(group, colour=rng.choice(list(COLOURS)))
        return _visible(Scene((group,), "alone", ground))
    layout: Layout = rng.choice(("left", "above", "left", "above", "pair"))
    if kind == "pair":
        groups = tuple(Group(thing) for thing in rng.sample(list(things()), 2))
        if rng.random() < 0.1:
            small, big = rng.sample(("small", "big"), 2)
            groups = (replace(groups[0], size=small), replace(groups[1], size=big))
        return Scene(groups, layout, ground)
    if kind == "pair, colours":
        one, other = _coloured(rng), _coloured(rng)
        while one.thing == other.thing:
            other = _coloured(rng)
        if rng.random() < 0.25:
            one = replace(one, colour=None)
        return _visible(Scene((one, other), layout, ground))
    if kind == "groups":
        counts = rng.choice(((2, 1), (1, 2), (2, 2), (3, 1), (1, 3)))
        one, other = (_counted(rng, count) for count in counts)
        while one.thing == other.thing:
            other = _counted(rng, counts[1])
        return Scene((one, other), layout, ground)
    if kind in ("three", "four"):
        number = 3 if kind == "three" else 4
        groups = tuple(Group(thing) for thing in rng.sample(list(things()), number))
        if rng.random() < 0.25:
            groups = tuple(
                replace(group, colour=rng.choice(list(COLOURS)))
                if group.thing in colourable() and rng.random() < 0.5
                else group
                for group in groups
            )
        layout = "corners" if number == 4 else rng.choice(("row", "row", "over"))
        return _visible(Scene(groups, layout, ground))
    raise ValueError(f"unknown kind of scene {kind!r}; known are {', '.join(_KINDS)}")


def _coloured(rng: random.Random) -> Group:
    return Group(rng.choice(colourable()), colour=rng.choice(list(COLOURS)))


def _counted(rng: random.Random, count: int) -> Group:
    countable = [thing.id for thing in things().values() if thing.countable or count == 1]
    return Group(rng.choice(countable), count=count)


def _visible(scene: Scene) -> Scene:
    """The scene without a ground of the colour of its things."""
    colours = {group.colour for group in scene.groups}
    return replace(scene, ground=None) if scene.ground in colours else scene
