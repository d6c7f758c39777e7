"""Trains the judge of scenes: a detector of things, from renderings of all that can be drawn.

    python -m tools.mini.world.judge --run runs/judge-scene --codec runs/decoders/codec --minutes 30

Held-out combinations are in its training: it measures, and is measured itself on renderings of
another seed. A part of the images goes through the codec, so that a decoder's best possible image
is read as well as a rendering; others are blurred or noisy. Some things fill the whole image.

Dimensions: P x P pixels.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmllm.evaluation.scene_judge import OWN, UNIT, Detector, SceneJudge, Verdict, shows
from mmllm.kernels.precision import fast_autocast
from mmllm.mini.world.rendering import SIDE, Placed, ground_of, paint, place
from mmllm.mini.world.scenes import Scene, draw
from tools.mini.world.detection import at_places, blurred, class_loss, middles_loss, place_of
from tools.mini.world.judge_weights import ship
from tools.mini.world.pool import image_codec
from tools.mini.world.run import Run, parse_run, train

BATCH, LEARNING_RATE = 32, 2e-3
THROUGH_CODEC = BATCH // 3
"""Images that go through the codec in one batch of three: it costs more than the detector does."""
NUM_MEASURED = 100
"""Renderings of each kind that a judge is measured on."""
FILLED = 0.25
"""Share of single things that fill the image, as those of a decoder without scenes do."""
KINDS = {
    "thing": 1, "colour": 3, "count": 1, "pair": 1, "pair, colours": 3, "groups": 1, "three": 1,
    "four": 1,
}  # fmt: skip
"""Kinds of scenes, and how many of each are drawn: there are six times as many things with a colour
as without."""


def drawn(
    kind: str, rng: random.Random, filled: bool = False
) -> tuple[Scene, list[Placed], Tensor]:
    """A scene, where its things stand, and its image as float[3, P, P] in -1..1.

    Args:
        kind: Of the scene.
        rng: Draws it.
        filled: Whether some of the things that are alone fill the image.
    """
    scene = draw(kind, rng)
    placed = list(place(scene, rng))
    if filled and len(placed) == 1 and rng.random() < FILLED:
        side = 2 * rng.randint(56, 64)
        placed = [replace(placed[0], x=SIDE / 2, y=SIDE / 2, side=side)]
    pixels = torch.from_numpy(paint(placed, ground_of(scene)))
    return scene, placed, pixels.permute(2, 0, 1).float() / 127.5 - 1


class Loss:
    """The loss of a step: of middles, and of what the things at them are."""

    def __init__(self, detector: Detector, codec: Any, seed: int):
        self.detector, self.codec, self.seed = detector, codec, seed

    def __call__(self, step: int, share: float) -> Tensor:
        rng = random.Random(f"{self.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        kinds = rng.choices(list(KINDS), list(KINDS.values()), k=BATCH)
        scenes = [drawn(kind, rng, filled=True) for kind in kinds]
        images = self.damaged(torch.stack([image for _, _, image in scenes]), rng, generator)
        with fast_autocast("cpu"):
            presence, sides, names, colours = self.detector(
                images.to(memory_format=torch.channels_last)
            )
        items = [(index, item) for index, (_, placed, _) in enumerate(scenes) for item in placed]
        places = [place_of(index, item.x, item.y) for index, item in items]
        things = [self.detector.names.index(item.thing) for _, item in items]
        paints = [self.detector.colours.index(item.colour or OWN) for _, item in items]
        widths = torch.tensor([math.log(item.side / UNIT) for _, item in items])
        return (
            middles_loss(presence, places)
            + class_loss(names, places, things)
            + class_loss(colours, places, paints)
            + functional.l1_loss(at_places(sides[:, None], places)[:, 0], widths)
        )

    @torch.no_grad()
    def damaged(self, images: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
        """In some batches a third through the codec; in all a third blurred and noisy."""
        third = BATCH // 3
        if rng.random() < 1 / 3:
            with fast_autocast("cpu"):
                latents = self.codec.encode(images[:THROUGH_CODEC]).latent_dist.mode()
                shaken = torch.randn(latents.shape, generator=generator) * latents.std()
                made = self.codec.decode(latents + 0.15 * rng.random() * shaken).sample
            images[:THROUGH_CODEC] = made.float()
        images[third : 2 * third] = blurred(images[third : 2 * third], rng, generator)
        return images.clamp(-1, 1)


def measure(file: Path) -> dict[str, float]:
    """Share of renderings of another seed that are read wholly right, by kind, and of all of them
    by attribute.

    Args:
        file: Weights of a judge.
    """
    judge = SceneJudge.load(file)
    scores = {}
    verdicts: list[Verdict] = []
    num_found = num_things = 0
    for kind in KINDS:
        rng = random.Random(f"measure {kind}")
        scenes = [drawn(kind, rng) for _ in range(NUM_MEASURED)]
        images = torch.stack([image for _, _, image in scenes])
        pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        found = judge.find(pixels)
        read = [shows(seen, scene) for seen, (scene, _, _) in zip(found, scenes, strict=True)]
        scores[kind] = sum(verdict.everything for verdict in read) / NUM_MEASURED
        verdicts += read
        for seen, (_, placed, _) in zip(found, scenes, strict=True):
            names, wanted = ([item.thing for item in some] for some in (seen, placed))
            num_found += (Counter(names) & Counter(wanted)).total()
            num_things += max(len(names), len(wanted))
    scores["each thing"] = num_found / num_things
    for name in ("things", "places", "colours", "sizes"):
        right = [getattr(verdict, name) for verdict in verdicts]
        scores[f"all kinds: {name}"] = sum(right) / len(right)
    return scores


def look(run: Run) -> None:
    """Write the weights, their scores and the card."""
    ship(
        run,
        Detector(),
        "scene",
        measure,
        what="Finds the things of an image with their colours, places and sizes.",
        source="renderings of scenes (`mmllm/mini/world/`), held-out combinations included, some "
        "through the codec of mini's images; sprites: Fluent Emoji, (c) Microsoft, MIT",
        command="python -m tools.mini.world.judge",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the judge of scenes.")
    parser.add_argument("--run", type=Path, required=True, help="an existing one goes on")
    parser.add_argument("--codec", type=Path, help="what tools.mini.codec wrote, if not shipped")
    arguments, progress = parse_run(parser, minutes=30)
    arguments.run.mkdir(parents=True, exist_ok=True)
    codec = image_codec(arguments.codec)
    detector: Any = Detector()
    detector = detector.train().to(memory_format=torch.channels_last)
    run = Run(
        arguments.run,
        detector,
        progress,
        LEARNING_RATE,
    )
    train(run, Loss(detector, codec, arguments.seed), look, arguments.every)


if __name__ == "__main__":
    main()
