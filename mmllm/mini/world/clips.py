"""Clips of mini's world: one or two things, each with a motion.

Dimensions: F = FRAMES frames of P x P pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmllm.mini.world.rendering import SIDE, Placed, ground_of, paint, place
from mmllm.mini.world.scenes import (
    Group,
    Scene,
    combinations,
    draw,
    is_heldout,
)

FRAMES = 9
FPS = 8.0

Move = Callable[[Placed, float], Placed | None]
"""(a thing where the scene has it, time 0..1) -> the thing at that time, or None if not there."""


def _shift(dx: float, dy: float) -> Move:
    """A way across the picture, its middle at half time."""
    return lambda item, time: replace(
        item, x=item.x + dx * (time - 0.5), y=item.y + dy * (time - 0.5)
    )


def _scale(first: float, last: float) -> Move:
    def move(item: Placed, time: float) -> Placed:
        factor = first + (last - first) * time
        return replace(item, side=max(6, 2 * round(item.side * factor / 2)))

    return move


def _bounce(item: Placed, time: float) -> Placed:
    return replace(item, y=item.y + 14 - 34 * abs(math.sin(2 * math.pi * time)))


def _spin(item: Placed, time: float) -> Placed:
    return replace(item, angle=-360 * time * FRAMES / (FRAMES + 1))


def _appear(item: Placed, time: float) -> Placed | None:
    return item if time >= 0.5 else None


MOTIONS: dict[str, Move] = {
    "left": _shift(-70, 0),
    "right": _shift(70, 0),
    "up": _shift(0, -70),
    "down": _shift(0, 70),
    "grow": _scale(0.4, 1.25),
    "shrink": _scale(1.25, 0.4),
    "spin": _spin,
    "bounce": _bounce,
    "appear": _appear,
}
"""Name -> how a thing moves."""


@dataclass(frozen=True)
class Clip:
    """What a clip shows: a scene, and how each of its groups moves."""

    scene: Scene
    motions: tuple[str | None, ...]
    """For every group one of MOTIONS, or None where it stands still."""


def draw_clip(rng: random.Random) -> Clip:
    """A clip of one thing, or of two next to each other, held out or not."""
    if rng.random() < 0.75:
        scene = draw("colour" if rng.random() < 0.4 else "thing", rng)
        scene = replace(scene, groups=(replace(scene.groups[0], size=None),))
        return Clip(scene, (rng.choice(list(MOTIONS)),))
    scene = draw("pair", rng)
    groups: tuple[Group, ...] = tuple(replace(group, size=None) for group in scene.groups)
    scene = replace(scene, groups=groups, layout="left")
    motions = (rng.choice(list(MOTIONS)), rng.choice([None, *MOTIONS]))
    return Clip(scene, motions if rng.random() < 0.5 else motions[::-1])


def is_training(clip: Clip) -> bool:
    """Whether neither the scene nor a thing's motion is held out."""
    moves = (
        ("motion", motion, group.thing)
        for group, motion in zip(clip.scene.groups, clip.motions, strict=True)
        if motion
    )
    return not any(map(is_heldout, (*combinations(clip.scene), *moves)))


def draw_training_clip(rng: random.Random) -> Clip:
    """A clip that holds nothing that is held out."""
    while True:
        clip = draw_clip(rng)
        if is_training(clip):
            return clip


def draw_heldout_clip(rng: random.Random) -> Clip:
    """A clip of which something is held out."""
    while True:
        clip = draw_clip(rng)
        if not is_training(clip):
            return clip


def render_clip(clip: Clip, rng: random.Random) -> NDArray[np.uint8]:
    """The frames of a clip, uint8[F, P, P, 3]; things in motion are in front."""
    if any(group.count > 1 for group in clip.scene.groups):
        raise ValueError("a clip shows one thing of a kind")
    placed = list(place(clip.scene, rng))
    pairs = sorted(zip(placed, clip.motions, strict=True), key=lambda pair: pair[1] is not None)
    frames = []
    for frame in range(FRAMES):
        time = frame / (FRAMES - 1)
        moved = [MOTIONS[motion](item, time) if motion else item for item, motion in pairs]
        frames.append(paint([item for item in moved if item is not None], ground_of(clip.scene)))
    result = np.stack(frames)
    assert result.shape == (FRAMES, SIDE, SIDE, 3)
    return result
