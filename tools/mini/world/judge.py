"""Trains the judge of scenes: a detector of things, from renderings of all that can be drawn.

    python -m tools.mini.world.judge --run runs/judge --codec runs/decoders/codec --minutes 30

Held-out combinations are in its training: it measures, and is measured itself on renderings of
another seed. A part of the images goes through the codec, so that a decoder's best possible image
is read as well as a rendering; others are blurred or noisy. Some things fill the whole image.

Dimensions: B images of P x P pixels, G x G cells.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from mmllm.evaluation.scene_judge import CELL, GRID, OWN, UNIT, Detector, SceneJudge, shows
from mmllm.mini.world.rendering import SIDE, Placed, ground_of, paint, place
from mmllm.mini.world.scenes import Scene, draw
from tools.mini.world.run import Run, parse_run, train

logger = logging.getLogger("scene_judge")

BATCH, LEARNING_RATE = 32, 2e-3
FILLED = 0.25
"""Share of single things that fill the image, as those of a decoder without scenes do."""
KINDS = ("thing", "colour", "count", "pair", "pair, colours", "groups", "three", "four")


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
    """The loss of a step: focal for middles (Lin et al. 2017), cross-entropy at them."""

    def __init__(self, detector: Detector, codec: Any, seed: int):
        self.detector, self.codec, self.seed = detector, codec, seed

    def __call__(self, step: int, share: float) -> Tensor:
        rng = random.Random(f"{self.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        scenes = [drawn(rng.choice(KINDS), rng, filled=True) for _ in range(BATCH)]
        images = self.damaged(torch.stack([image for _, _, image in scenes]), rng, generator)
        with torch.autocast("cpu", torch.bfloat16):
            presence, sides, names, colours = self.detector(
                images.to(memory_format=torch.channels_last)
            )
        target = torch.zeros(BATCH, GRID, GRID)
        near = torch.zeros(BATCH, GRID, GRID)  # next to a middle: neither wanted nor punished
        places, widths, things, paints = [], [], [], []
        for index, (_, placed, _) in enumerate(scenes):
            for item in placed:
                row = min(max(int(item.y / CELL), 0), GRID - 1)
                column = min(max(int(item.x / CELL), 0), GRID - 1)
                near[index, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 1
                target[index, row, column] = 1
                places.append((index, row, column))
                widths.append(math.log(item.side / UNIT))
                things.append(self.detector.names.index(item.thing))
                paints.append(self.detector.colours.index(item.colour or OWN))
        probability = presence.float().sigmoid()
        wrong = torch.where(target > 0, 1 - probability, probability)
        entropy = functional.binary_cross_entropy_with_logits(
            presence.float(), target, reduction="none"
        )
        weight = torch.where((near > 0) & (target == 0), 0.0, 1.0)
        focal = (weight * wrong.square() * entropy).sum() / len(places)
        batch, row, column = (torch.tensor(list(axis)) for axis in zip(*places, strict=True))
        named = functional.cross_entropy(names.float()[batch, :, row, column], torch.tensor(things))
        painted = functional.cross_entropy(
            colours.float()[batch, :, row, column], torch.tensor(paints)
        )
        sized = functional.l1_loss(sides.float()[batch, row, column], torch.tensor(widths))
        return focal + named + painted + sized

    @torch.no_grad()
    def damaged(self, images: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
        """A third through the codec, a third blurred or noisy, a third as rendered."""
        third = BATCH // 3
        if self.codec is not None:
            latents = self.codec.encode(images[:third]).latent
            shaken = torch.randn(latents.shape, generator=generator) * latents.std()
            images[:third] = self.codec.decode(latents + 0.15 * rng.random() * shaken).sample
        blurred = functional.avg_pool2d(images[third : 2 * third], 3, stride=1, padding=1)
        noise = torch.randn(blurred.shape, generator=generator)
        images[third : 2 * third] = blurred + 0.1 * rng.random() * noise
        return images.clamp(-1, 1)


def measure(judge: SceneJudge, count: int = 100) -> dict[str, float]:
    """Share of renderings of another seed that are read wholly right, by kind."""
    scores = {}
    for kind in KINDS:
        rng = random.Random(f"measure {kind}")
        scenes = [drawn(kind, rng) for _ in range(count)]
        images = torch.stack([image for _, _, image in scenes])
        pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        found = judge.find(pixels)
        right = [
            shows(seen, scene).everything for seen, (scene, _, _) in zip(found, scenes, strict=True)
        ]
        scores[kind] = sum(right) / count
    return scores


def ship(run: Run) -> None:
    """Write the averaged weights in half precision, and how well they read renderings."""
    detector = Detector()
    run.load_averages(detector)
    state = {name: weight.half().contiguous() for name, weight in detector.state_dict().items()}
    save_file(state, run.folder / "judge.safetensors")
    scores = measure(SceneJudge.load(run.folder / "judge.safetensors"))
    (run.folder / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    logger.info("%d steps, %s", run.progress.step, scores)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the judge of scenes.")
    parser.add_argument("--run", type=Path, required=True, help="an existing one goes on")
    parser.add_argument("--codec", type=Path, help="without one, nothing goes through a codec")
    arguments, progress = parse_run(parser, minutes=30)
    arguments.run.mkdir(parents=True, exist_ok=True)
    codec: Any = AutoencoderDC.from_pretrained(arguments.codec) if arguments.codec else None
    detector: Any = Detector()
    detector = detector.train().to(memory_format=torch.channels_last)
    run = Run(
        arguments.run,
        detector,
        progress,
        LEARNING_RATE,
    )
    train(run, Loss(detector, codec, arguments.seed), ship, arguments.every)


if __name__ == "__main__":
    main()
