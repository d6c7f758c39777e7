"""What the trainings of the two detectors, of scenes and of clips, share.

Dimensions: B images or clips, G x G cells, N middles in the batch, K classes.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional

from mmllm.evaluation.scene_judge import CELL, GRID

Place = tuple[int, int, int]
"""Number in the batch, row and column of the cell that holds a thing's middle."""


def place_of(number: int, x: float, y: float) -> Place:
    """The cell of a middle.

    Args:
        number: In the batch.
        x: In pixels of a rendering, from the left; outside, the nearest cell counts.
        y: The same from the top.
    """
    return number, _cell(y), _cell(x)


def _cell(middle: float) -> int:
    return min(max(int(middle / CELL), 0), GRID - 1)


def middles_loss(presence: Tensor, places: list[Place]) -> Tensor:
    """Focal loss of middles (Lin et al. 2017); cells around one are neither wanted nor punished.

    Args:
        presence: Logits, float[B, G, G].
        places: Of all middles.
    """
    target, near = torch.zeros(presence.shape), torch.zeros(presence.shape)
    for number, row, column in places:
        near[number, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 1
        target[number, row, column] = 1
    logits = presence.float()
    probability = logits.sigmoid()
    wrong = torch.where(target > 0, 1 - probability, probability)
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    weight = torch.where((near > 0) & (target == 0), 0.0, 1.0)
    return (weight * wrong.square() * entropy).sum() / len(places)


def at_places(maps: Tensor, places: list[Place]) -> Tensor:
    """The values of maps at all middles: float[B, K, G, G] -> float[N, K]."""
    number, row, column = (torch.tensor(list(axis)) for axis in zip(*places, strict=True))
    return maps.float()[number, :, row, column]


def class_loss(maps: Tensor, places: list[Place], targets: list[int]) -> Tensor:
    """Cross-entropy at the middles.

    Args:
        maps: Logits, float[B, K, G, G].
        places: Of all middles.
        targets: The class of each.
    """
    return functional.cross_entropy(at_places(maps, places), torch.tensor(targets))


def blurred(images: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
    """Blurred images with some noise, float[B, 3, P, P].

    Args:
        images: In -1..1.
        rng: Draws how much noise.
        generator: Draws the noise.
    """
    smooth = functional.avg_pool2d(images, 3, stride=1, padding=1)
    return smooth + 0.1 * rng.random() * torch.randn(smooth.shape, generator=generator)
