"""Trains the judge of clips: a detector of things and their motions, from renderings.

    python -m tools.mini.world.clip_judge --run runs/judge-clip --minutes 30

Held-out combinations are in its training: it measures, and is measured itself on renderings of
another seed. A third of the clips are blurred and noisy.

Dimensions: B clips of F frames of P x P pixels.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmllm.evaluation.clip_judge import (
    STILL,
    ClipDetector,
    ClipJudge,
    detector_input,
    shows_clip,
)
from mmllm.evaluation.scene_judge import OWN
from mmllm.kernels.precision import fast_autocast
from mmllm.mini.world.clips import Clip, draw_clip, is_training, render_clip
from mmllm.mini.world.rendering import Placed, place
from tools.mini.world.detection import blurred, class_loss, middles_loss, place_of
from tools.mini.world.judge_weights import ship
from tools.mini.world.run import Run, parse_run, train

BATCH, LEARNING_RATE = 32, 2e-3
NUM_MEASURED = 400
"""Renderings that a judge is measured on."""


def drawn(rng: random.Random) -> tuple[Clip, list[Placed], NDArray[np.uint8]]:
    """A clip, where its things are at half time, and its frames as uint8[F, P, P, 3]."""
    clip = draw_clip(rng)
    seed = rng.getrandbits(60)
    return (
        clip,
        list(place(clip.scene, random.Random(seed))),
        render_clip(clip, random.Random(seed)),
    )


class Loss:
    """The loss of a step: of middles, and of what the things at them are and how they move."""

    def __init__(self, detector: ClipDetector, seed: int):
        self.detector, self.seed = detector, seed

    def __call__(self, step: int, share: float) -> Tensor:
        rng = random.Random(f"{self.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        clips = [drawn(rng) for _ in range(BATCH)]
        frames = detector_input(np.stack([frames for _, _, frames in clips]))
        third = BATCH // 3
        damaged = blurred(frames[:third].flatten(0, 1), rng, generator)
        frames[:third] = damaged.unflatten(0, (third, -1)).clamp(-1, 1)
        with fast_autocast("cpu"):
            presence, names, colours, motions = self.detector(frames)
        items = [
            (index, item, motion)
            for index, (clip, placed, _) in enumerate(clips)
            for item, motion in zip(placed, clip.motions, strict=True)
        ]
        places = [place_of(index, item.x, item.y) for index, item, _ in items]
        detector = self.detector
        return (
            middles_loss(presence, places)
            + class_loss(names, places, [detector.names.index(i.thing) for _, i, _ in items])
            + class_loss(
                colours, places, [detector.colours.index(i.colour or OWN) for _, i, _ in items]
            )
            + class_loss(motions, places, [detector.motions.index(m or STILL) for *_, m in items])
        )


def measure(file: Path) -> dict[str, float]:
    """Share of renderings of another seed that are read right, by attribute.

    Args:
        file: Weights of a judge.
    """
    judge = ClipJudge.load(file)
    rng = random.Random("measure clips")
    clips = [drawn(rng) for _ in range(NUM_MEASURED)]
    found = [
        seen
        for start in range(0, NUM_MEASURED, BATCH)
        for seen in judge.find(np.stack([frames for _, _, frames in clips[start : start + BATCH]]))
    ]
    verdicts = [shows_clip(seen, clip) for seen, (clip, _, _) in zip(found, clips, strict=True)]
    groups = {
        "": [True] * NUM_MEASURED,
        "one thing: ": [len(clip.motions) == 1 for clip, _, _ in clips],
        "two things: ": [len(clip.motions) == 2 for clip, _, _ in clips],
        "held-out combinations: ": [not is_training(clip) for clip, _, _ in clips],
    }
    return {
        f"{group}{name}": float(
            np.mean([getattr(verdicts[i], name) for i in np.flatnonzero(chosen)])
        )
        for group, chosen in groups.items()
        if any(chosen)
        for name in ("things", "motions", "colours", "everything")
    }


def look(run: Run) -> None:
    """Write the weights, their scores and the card."""
    ship(
        run,
        ClipDetector(),
        "clip",
        measure,
        what="Finds the things of a clip with their colours and motions.",
        source="renderings of clips (`mmllm/mini/world/clips.py`), held-out combinations included; "
        "sprites: Fluent Emoji, (c) Microsoft, MIT",
        command="python -m tools.mini.world.clip_judge",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the judge of clips.")
    parser.add_argument("--run", type=Path, required=True, help="an existing one goes on")
    arguments, progress = parse_run(parser, minutes=30)
    arguments.run.mkdir(parents=True, exist_ok=True)
    detector: Any = ClipDetector().train()
    run = Run(arguments.run, detector, progress, LEARNING_RATE)
    train(run, Loss(detector, arguments.seed), look, arguments.every)


if __name__ == "__main__":
    main()
