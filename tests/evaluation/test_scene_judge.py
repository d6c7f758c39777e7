"""What the judge of scenes calls right, and that it reads what it was trained to read."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmllm.evaluation.scene_judge import (
    OWN,
    Detector,
    Found,
    SceneJudge,
    find_ground,
    peaks,
    shows,
)
from mmllm.mini.world.rendering import SIDE, render
from mmllm.mini.world.scenes import GROUNDS, Group, Scene

CAT, DOG, CAR, TREE = (Group(thing) for thing in ("cat", "dog", "car", "tree"))
LEFT = Scene((CAT, DOG), "left")


def found(thing: str, x: float, y: float, colour: str = OWN, side: float = 56) -> Found:
    return Found(thing, colour, x, y, side, 0.9)


def test_things_in_their_places() -> None:
    seen = [found("cat", 32, 64), found("dog", 96, 64)]
    assert shows(seen, LEFT).everything
    assert shows(seen[::-1], LEFT).everything
    assert shows(seen, Scene((CAT, DOG), "pair")).everything
    verdict = shows(seen, Scene((DOG, CAT), "left"))
    assert verdict.things
    assert not verdict.places
    assert not shows(seen, Scene((CAT, DOG), "above")).places


@pytest.mark.parametrize(
    "seen",
    [
        [],
        [found("cat", 32, 64)],
        [found("cat", 32, 64), found("cat", 96, 64)],
        [found("cat", 32, 64), found("dog", 96, 64), found("dog", 96, 100)],
    ],
)
def test_missing_wrong_or_surplus_things(seen: list[Found]) -> None:
    verdict = shows(seen, LEFT)
    assert not (verdict.things)
    assert not (verdict.places)
    assert not (verdict.colours)


def test_colours_and_numbers() -> None:
    scene = Scene((Group("cat", 2, "red"),))
    assert shows([found("cat", 32, 64, "red"), found("cat", 96, 64, "red")], scene).everything
    assert not shows([found("cat", 32, 64, "red"), found("cat", 96, 64, OWN)], scene).colours
    assert not shows([found("cat", 32, 64, "red")], scene).things
    assert shows([found("cat", 32, 64, "blue")], Scene((CAT,))).everything


def test_sizes_are_those_of_renderings_of_the_scene() -> None:
    for size, side in (("small", 44), (None, 88), ("big", 112)):
        alone = [found("cat", 64, 64, side=side)]
        for asked in ("small", "big"):
            assert shows(alone, Scene((Group("cat", size=asked),))).sizes == (size == asked)
        assert shows(alone, Scene((CAT,))).everything
    both = [found("cat", 32, 64, side=33), found("dog", 96, 64, side=63)]
    small, big = Group("cat", size="small"), Group("dog", size="big")
    assert shows(both, Scene((small, big), "left")).everything
    assert not shows(both, Scene((replace(small, size="big"), big), "left")).sizes


def test_the_ground_is_that_of_the_border() -> None:
    for name, colour in GROUNDS.items():
        scene = Scene((Group("cat"),), "alone", name)
        image = render(scene, random.Random(0))
        assert find_ground(image) == name, colour
    corner = image.copy()
    corner[:60, :60] = 0
    assert find_ground(corner) == "pink"


def test_more_than_two() -> None:
    row = [found("cat", 20, 64), found("dog", 64, 64), found("car", 108, 64)]
    assert shows(row, Scene((CAT, DOG, CAR), "row")).places
    assert not shows(row, Scene((DOG, CAT, CAR), "row")).places
    over = [found("cat", 64, 32), found("dog", 32, 96), found("car", 96, 96)]
    assert shows(over, Scene((CAT, DOG, CAR), "over")).places
    assert not shows(over, Scene((DOG, CAT, CAR), "over")).places
    corners = [
        found("cat", 32, 32),
        found("dog", 96, 32),
        found("car", 32, 96),
        found("tree", 96, 96),
    ]
    assert shows(corners, Scene((CAT, DOG, CAR, TREE), "corners")).places
    assert not shows(corners, Scene((CAT, CAR, DOG, TREE), "corners")).places


def test_peaks_become_things() -> None:
    """A detector whose head answers by position alone: one confident cell an image."""
    detector = Detector(width=16, blocks=1)
    judge = SceneJudge(detector)
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    assert judge.find(images) == [[], []]

    def head(states: torch.Tensor) -> torch.Tensor:
        maps = torch.full((len(states), detector.head.out_channels, 16, 16), -6.0)
        maps[0, 0, 3, 5] = 6.0
        maps[0, 1, 3, 5] = 0.5
        maps[0, 2 + detector.names.index("dog"), 3, 5] = 1.0
        maps[0, 2 + len(detector.names) + detector.colours.index("blue"), 3, 5] = 1.0
        return maps

    detector.head.forward = head  # pyright: ignore[reportAttributeAccessIssue]
    first, second = judge.find(images)
    assert second == []
    assert [(item.thing, item.colour) for item in first] == [("dog", "blue")]
    assert (first[0].x, first[0].y) == (44, 28)
    assert first[0].side == pytest.approx(56 * math.exp(0.5))
    assert first[0].confidence == pytest.approx(0.881, abs=1e-3)


def test_weights_come_back_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = Detector()
    file = tmp_path / "judge.safetensors"
    save_file({n: w.half().contiguous() for n, w in detector.state_dict().items()}, file)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    again = SceneJudge.load(file).detector
    for one, other in zip(detector(pixels), again(pixels), strict=True):
        assert torch.allclose(one, other, atol=0.05)


def test_of_two_certain_neighbours_one_is_a_thing() -> None:
    """Both probabilities are 1.0 in float32: of 400 clips 43 had a thing twice by that."""
    presence = torch.full((1, 8, 8), -20.0)
    presence[0, 3, 3], presence[0, 3, 4], presence[0, 6, 1] = 24.0, 25.0, 30.0
    assert presence[0, 3, 3].sigmoid() == presence[0, 3, 4].sigmoid()
    assert [found[:3] for found in peaks(presence)] == [(0, 3, 4), (0, 6, 1)]
