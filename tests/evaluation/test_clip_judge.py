"""What the judge of clips calls right, what its detector sees, and that peaks become things."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmllm.evaluation.clip_judge import (
    SEEN,
    STILL,
    ClipDetector,
    ClipJudge,
    MovingThing,
    detector_input,
    shows_clip,
)
from mmllm.evaluation.scene_judge import OWN
from mmllm.mini.world.clips import FRAMES, Clip, render_clip
from mmllm.mini.world.rendering import SIDE
from mmllm.mini.world.scenes import Group, Scene

CAT, RED_CAR = Group("cat"), Group("car", colour="red")
PAIR = Clip(Scene((CAT, RED_CAR), "left"), ("spin", None))


def moving(thing: str, motion: str = STILL, colour: str = OWN) -> MovingThing:
    return MovingThing(thing, colour, motion, 64, 64, 0.9)


@pytest.mark.parametrize(
    ("found", "things", "motions", "colours"),
    [
        ([moving("cat", "spin"), moving("car", colour="red")], True, True, True),
        ([moving("car", colour="red"), moving("cat", "spin", "blue")], True, True, True),
        ([moving("cat", "up"), moving("car", colour="red")], True, False, True),
        ([moving("cat", "spin"), moving("car", "spin", "red")], True, False, True),
        ([moving("cat", "spin"), moving("car")], True, True, False),
        ([moving("cat", "spin")], False, False, False),
        ([moving("cat", "spin"), moving("dog")], False, False, False),
        ([moving("cat", "spin"), moving("car"), moving("dog")], False, False, False),
    ],
)
def test_things_motions_and_colours(
    found: list[MovingThing], things: bool, motions: bool, colours: bool
) -> None:
    verdict = shows_clip(found, PAIR)
    assert (verdict.things, verdict.motions, verdict.colours) == (things, motions, colours)
    assert verdict.everything == (things and motions and colours)


def test_the_detector_sees_every_pixel_of_a_rendering_at_half_its_size() -> None:
    frames = render_clip(Clip(Scene((CAT,)), ("left",)), random.Random(0))
    assert frames.shape == (FRAMES, SIDE, SIDE, 3)
    seen = detector_input(frames[None])
    assert seen.shape == (1, FRAMES, 3, SEEN, SEEN)
    means = frames.reshape(FRAMES, -1, 3).mean(1) / 127.5 - 1
    assert np.allclose(seen[0].mean((2, 3)).numpy(), means, atol=0.01)
    small = np.random.default_rng(0).integers(0, 256, (1, FRAMES, SEEN, SEEN, 3), dtype=np.uint8)
    assert torch.equal(detector_input(small)[0, 3, 1, 5, 7] * 127.5 + 127.5, _pixel(small))


def _pixel(clips: np.ndarray) -> torch.Tensor:
    return torch.tensor(float(clips[0, 3, 5, 7, 1]))


def test_peaks_become_moving_things() -> None:
    detector = ClipDetector(width=16, blocks=1)
    judge = ClipJudge(detector)
    clips = np.zeros((2, FRAMES, SEEN, SEEN, 3), np.uint8)
    assert judge.find(clips) == [[], []]
    classes = ((detector.names, "dog"), (detector.colours, "blue"), (detector.motions, "up"))

    def head(states: torch.Tensor) -> torch.Tensor:
        maps = torch.full((len(states), detector.head.out_channels, 16, 16), -6.0)
        maps[1, 0, 3, 5] = 6.0
        start = 1
        for names, name in classes:
            maps[1, start + names.index(name), 3, 5] = 1.0
            start += len(names)
        return maps

    detector.head.forward = head  # pyright: ignore[reportAttributeAccessIssue]
    first, (thing,) = judge.find(clips)
    assert first == []
    assert (thing.thing, thing.colour, thing.motion) == ("dog", "blue", "up")
    assert (thing.x, thing.y) == (44, 28)


def test_weights_come_back_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = ClipDetector()
    assert sum(weight.numel() for weight in detector.parameters()) < 600_000
    file = tmp_path / "clip.safetensors"
    save_file({n: w.half().contiguous() for n, w in detector.state_dict().items()}, file)
    frames = torch.randn(1, FRAMES, 3, SEEN, SEEN)
    again = ClipJudge.load(file).detector
    for one, other in zip(detector(frames), again(frames), strict=True):
        assert torch.allclose(one, other, atol=0.05)
