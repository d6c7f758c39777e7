"""A judge of scenes: a small detector that finds the things of an image: colours, places and sizes.

It is trained from pixels on renderings of mini's world (`tools/mini/world/judge.py`) and shares
nothing with mini. What an image shows is compared with what was asked for by `shows`.

Dimensions: B images of P x P pixels, G x G cells of 8 pixels, N things, C colours.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mmllm.mini.world.rendering import SIDE, place
from mmllm.mini.world.scenes import GROUNDS, Group, Scene, Size
from mmllm.mini.world.things import COLOURS, things

CELL = 8
GRID = SIDE // CELL
OWN = "own"
"""The colour class of things that keep the colours they have."""
EMPTY = -4.0
"""Logit of a middle before anything is seen: nearly every cell is empty."""
UNIT = 56.0
"""Pixels of a side of 1: about that of one of two things."""
_THRESHOLD = 0.4


@dataclass(frozen=True)
class Found:
    """One thing that the judge sees."""

    thing: str
    colour: str
    """One of COLOURS, or OWN."""
    x: float
    """Middle in pixels, from the left."""
    y: float
    """Middle in pixels, from the top."""
    side: float
    """Of its sprite, in pixels."""
    confidence: float


class Residual(nn.Module):
    """Two convolutions around which their input goes by."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, states: Tensor) -> Tensor:
        """float[M, C, H, W] -> float[M, C, H, W]."""
        return states + self.conv_out(functional.silu(self.conv_in(self.norm(states))))


class Detector(nn.Module):
    """Images -> maps of what has its middle in each cell."""

    def __init__(self, width: int = 112, blocks: int = 6):
        super().__init__()
        self.names, self.colours = list(things()), [OWN, *COLOURS]
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 64, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, width, 4, stride=2, padding=1),
        )
        self.body = nn.Sequential(*(Residual(width, (1, 2, 1, 4)[i % 4]) for i in range(blocks)))
        self.head = nn.Conv2d(width, 2 + len(self.names) + len(self.colours), 1, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What has its middle in each cell.

        Args:
            images: float[B, 3, P, P] in -1..1.

        Returns:
            Logits of a middle being there, float[B, G, G]; log of its side in UNIT,
            float[B, G, G]; logits of things, float[B, N, G, G], and of colours, float[B, C, G, G].
        """
        maps = self.head(functional.silu(self.body(self.stem(images))))
        presence, side, names, colours = maps.split(
            [1, 1, len(self.names), len(self.colours)], dim=1
        )
        return presence[:, 0] + EMPTY, side[:, 0], names, colours


class SceneJudge:
    """Finds things in images.

    Args:
        detector: Trained weights.
    """

    def __init__(self, detector: Detector):
        self.detector = detector.eval()

    @classmethod
    def load(cls, file: Path) -> SceneJudge:
        """A judge from a file of weights."""
        detector = Detector()
        detector.load_state_dict({name: w.float() for name, w in load_file(file).items()})
        return cls(detector)

    @torch.inference_mode()
    def find(self, images: NDArray[np.uint8]) -> list[list[Found]]:
        """The things of each image.

        Args:
            images: uint8[B, P, P, 3].
        """
        pixels = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        presence, side, names, colours = self.detector(pixels)
        found: list[list[Found]] = [[] for _ in images]
        for image, row, column, confidence in peaks(presence):
            found[image].append(
                Found(
                    self.detector.names[int(names[image, :, row, column].argmax())],
                    self.detector.colours[int(colours[image, :, row, column].argmax())],
                    (column + 0.5) * CELL,
                    (row + 0.5) * CELL,
                    UNIT * side[image, row, column].exp().item(),
                    confidence,
                )
            )
        return found


def peaks(presence: Tensor) -> list[tuple[int, int, int, float]]:
    """The cells that are more likely than their neighbours to have a middle, and likely enough.

    Args:
        presence: logits, float[B, G, G].

    Returns:
        Image, row, column and probability of each.
    """
    probability = presence.sigmoid()
    # Of logits: probabilities of 1.0 are equal.
    highest = functional.max_pool2d(presence[:, None], 3, stride=1, padding=1)[:, 0]
    cells = ((presence == highest) & (probability > _THRESHOLD)).nonzero().tolist()
    return [
        (image, row, column, probability[image, row, column].item()) for image, row, column in cells
    ]


def find_ground(image: NDArray[np.uint8]) -> str:
    """The background of an image, one of GROUNDS: the nearest to the colour of most of its border.

    Args:
        image: uint8[P, P, 3].
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    colour = np.median(border, axis=0) / 255
    return min(GROUNDS, key=lambda name: float(np.abs(colour - GROUNDS[name]).sum()))


@dataclass(frozen=True)
class Verdict:
    """In what an image is as it was asked for."""

    things: bool
    """The right things in the right numbers, and nothing else."""
    places: bool
    """Those, and each where it belongs."""
    colours: bool
    """Those, in the right colours."""
    sizes: bool
    """Those, small or big as each should be."""

    @property
    def everything(self) -> bool:
        """Whether all is as it was asked for."""
        return self.things and self.places and self.colours and self.sizes


def shows(found: Sequence[Found], scene: Scene) -> Verdict:
    """Compare what is found in an image with a scene.

    Args:
        found: the things that the judge detects, with colours and places.
        scene: what was asked for. A colour or size that it leaves open may be any; places are
            compared by the middles of groups.
    """
    wanted = Counter[str]()
    for group in scene.groups:
        wanted[group.thing] += group.count
    right = Counter(item.thing for item in found) == wanted
    if not right:
        return Verdict(False, False, False, False)
    colours = all(
        group.colour in (None, item.colour)
        for group in scene.groups
        for item in found
        if item.thing == group.thing
    )
    sizes = all(
        _size(found, scene, index) == group.size
        for index, group in enumerate(scene.groups)
        if group.size
    )
    return Verdict(True, _in_place(found, scene), colours, sizes)


def _size(found: Sequence[Found], scene: Scene, index: int) -> Size | None:
    """The size of a group: that whose renderings have the nearest sides."""
    group = scene.groups[index]
    sides = [item.side for item in found if item.thing == group.thing]
    side = math.prod(sides) ** (1 / len(sides))

    def distance(size: Size | None) -> float:
        groups = list(scene.groups)
        groups[index] = replace(group, size=size)
        placed = place(replace(scene, groups=tuple(groups)), random.Random(0))
        rendered = next(item.side for item in placed if item.thing == group.thing)
        return abs(math.log(side / rendered))

    sizes: tuple[Size | None, ...] = ("small", None, "big")
    return min(sizes, key=distance)


def _in_place(found: Sequence[Found], scene: Scene) -> bool:
    def middle(group: Group) -> tuple[float, float]:
        own = [item for item in found if item.thing == group.thing]
        return sum(i.x for i in own) / len(own), sum(i.y for i in own) / len(own)

    points = [middle(group) for group in scene.groups]
    gap = 1.5 * CELL

    def left(one: int, other: int) -> bool:
        (x, y), (other_x, other_y) = points[one], points[other]
        return other_x - x > gap and abs(other_y - y) < other_x - x

    def above(one: int, other: int) -> bool:
        (x, y), (other_x, other_y) = points[one], points[other]
        return other_y - y > gap and abs(other_x - x) < other_y - y

    def over(one: int, other: int) -> bool:
        return points[other][1] - points[one][1] > gap

    match scene.layout:
        case "alone":
            return True
        case "left":
            return left(0, 1)
        case "above":
            return above(0, 1)
        case "pair":
            return left(0, 1) or left(1, 0)
        case "row":
            return left(0, 1) and left(1, 2)
        case "over":
            return over(0, 1) and over(0, 2) and left(1, 2)
        case "corners":
            return left(0, 1) and left(2, 3) and above(0, 2) and above(1, 3)
