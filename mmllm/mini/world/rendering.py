"""Scenes as pixels: sprites in their places on a ground.

Dimensions: P = SIDE pixels, S pixels of a sprite as drawn.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmllm.mini.world.scenes import GROUNDS, Group, Scene
from mmllm.mini.world.things import SPRITE, sprite

SIDE = 128
"""Both sides of a picture, in pixels."""

_SCALES = {None: 1.0, "small": 0.6, "big": 1.12}
_ALONE = 88  # pixels of a single thing of ordinary size
_ALONE_SCALES = {None: 1.0, "small": 0.5, "big": 1.27}


@dataclass(frozen=True)
class Placed:
    """One sprite: its middle and its side in pixels."""

    thing: str
    colour: str | None
    x: float
    y: float
    side: int
    angle: float = 0.0
    """Degrees, counter-clockwise."""


def render(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
    """The picture of a scene, uint8[P, P, 3].

    Args:
        scene: What it shows.
        rng: Moves things by a few pixels, and orders those that stand side by side.
    """
    return paint(list(place(scene, rng)), ground_of(scene))


def paint(placed: list[Placed], ground: tuple[float, float, float]) -> NDArray[np.uint8]:
    """Sprites on a ground, the later over the earlier, uint8[P, P, 3]."""
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = ground
    for item in placed:
        _draw(canvas, item)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def place_picture(file: Path, rng: random.Random) -> NDArray[np.uint8]:
    """A picture on white somewhere on a white or grey ground, from half to all of its side,
    uint8[P, P, 3].

    Args:
        file: The picture.
        rng: Chooses the ground, the size and the place.
    """
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = GROUNDS[rng.choice(("white", "white", "grey"))]
    side = rng.randint(SIDE // 2, SIDE)
    x, y = rng.randint(0, SIDE - side), rng.randint(0, SIDE - side)
    with Image.open(file) as opened:
        small = opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    canvas[y : y + side, x : x + side] *= np.asarray(small, np.float32) / 255  # white is clear
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def ground_of(scene: Scene) -> tuple[float, float, float]:
    """The background as RGB in 0..1."""
    if scene.ground:
        return GROUNDS[scene.ground]
    pale = any(group.colour == "white" for group in scene.groups)
    return GROUNDS["grey" if pale else "white"]


def place(scene: Scene, rng: random.Random) -> Iterator[Placed]:
    """Every thing of a scene in its place."""
    if scene.layout == "alone":
        yield from _place_group(scene.groups[0], (0, 0, SIDE, SIDE), rng, alone=True)
        return
    boxes = _boxes(scene.layout)
    if scene.layout == "pair" and rng.random() < 0.5:
        boxes.reverse()
    for group, box in zip(scene.groups, boxes, strict=True):
        yield from _place_group(group, box, rng)


Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


def _boxes(layout: str) -> list[Box]:
    half, third = SIDE // 2, SIDE // 3
    return {
        "left": [(0, 0, half, SIDE), (half, 0, SIDE, SIDE)],
        "pair": [(0, 0, half, SIDE), (half, 0, SIDE, SIDE)],
        "above": [(0, 0, SIDE, half), (0, half, SIDE, SIDE)],
        "row": [(third * i, 0, third * (i + 1), SIDE) for i in range(3)],
        "over": [(0, 0, SIDE, half), (0, half, half, SIDE), (half, half, SIDE, SIDE)],
        "corners": [
            (0, 0, half, half),
            (half, 0, SIDE, half),
            (0, half, half, SIDE),
            (half, half, SIDE, SIDE),
        ],
    }[layout]


def _place_group(
    group: Group, box: Box, rng: random.Random, alone: bool = False
) -> Iterator[Placed]:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    rows = _rows(group.count, width, height)
    cell_height = height / len(rows)
    cell_width = width / max(rows)
    if alone and group.count == 1:
        side = _ALONE * _ALONE_SCALES[group.size]
    else:
        side = min(cell_width, cell_height, 60) * 0.88 * _SCALES[group.size]
    # Little: where a thing may stand anywhere, what it is explains less of a picture than where.
    side *= rng.uniform(0.97, 1.0)
    slack = 2.0
    for row, columns in enumerate(rows):
        for column in range(columns):
            x = left + width / 2 + (column - (columns - 1) / 2) * cell_width
            y = top + (row + 0.5) * cell_height
            free_x = min(slack, max(0.0, (cell_width - side) / 2))
            free_y = min(slack, max(0.0, (cell_height - side) / 2))
            yield Placed(
                group.thing,
                group.colour,
                x + rng.uniform(-free_x, free_x),
                y + rng.uniform(-free_y, free_y),
                2 * round(side / 2),
            )


def _rows(count: int, width: float, height: float) -> tuple[int, ...]:
    """How many things stand in each row of a box."""
    if count == 1:
        return (1,)
    if height > 1.5 * width:
        return (1,) * count if count < 4 else (2, 2)
    if width > 1.5 * height:
        return (count,)
    return {2: (2,), 3: (1, 2), 4: (2, 2)}[count]


@functools.lru_cache(maxsize=20_000)
def _scaled(thing: str, colour: str | None, side: int, angle: float) -> NDArray[np.float32]:
    """Premultiplied RGBA, float32[S, S, 4]."""
    pixels = (sprite(thing, colour) * 255 + 0.5).clip(0, 255).astype(np.uint8)
    image = Image.frombytes("RGBa", (SPRITE, SPRITE), pixels.tobytes())  # "a": premultiplied
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC)
    resized = image.resize((side, side), Image.Resampling.LANCZOS)
    return (np.asarray(resized) / 255).astype(np.float32)


def _draw(canvas: NDArray[np.float32], item: Placed) -> None:
    """Compose one sprite onto the canvas, in place; what lies outside is cut."""
    pixels = _scaled(item.thing, item.colour, item.side, item.angle)
    left, top = round(item.x - item.side / 2), round(item.y - item.side / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + item.side, SIDE), min(top + item.side, SIDE)
    if x0 >= x1 or y0 >= y1:
        return
    part = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    area = canvas[y0:y1, x0:x1]
    area *= 1 - part[..., 3:]
    area += part[..., :3]
