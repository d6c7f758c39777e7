"""A judge of clips: a small detector that finds the things of a clip, with colours and motions.

It is trained from pixels on renderings of mini's world (`tools/mini/world/clip_judge.py`) and
shares nothing with mini. What a clip shows is compared with what was asked for by `shows_clip`.

Dimensions: B clips of F frames of P x P pixels, G x G cells, N things, C colours, M motions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mmllm.evaluation.scene_judge import CELL, EMPTY, OWN, Residual, peaks
from mmllm.mini.world.clips import FRAMES, MOTIONS, Clip
from mmllm.mini.world.things import COLOURS, things

SEEN = 64
"""Both sides of what the detector sees, in pixels: half of a rendering."""
STILL = "still"
"""The motion class of things that stand still."""


@dataclass(frozen=True)
class MovingThing:
    """One thing that the judge sees in a clip."""

    thing: str
    colour: str
    """One of COLOURS, or OWN."""
    motion: str
    """One of MOTIONS, or STILL."""
    x: float
    """Middle at half time in pixels of a rendering, from the left."""
    y: float
    """The same from the top."""
    confidence: float


class ClipDetector(nn.Module):
    """Clips -> maps of what has its middle in each cell at half time."""

    def __init__(self, width: int = 80, blocks: int = 4):
        super().__init__()
        self.names, self.colours = list(things()), [OWN, *COLOURS]
        self.motions = [STILL, *MOTIONS]
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 48, 4, stride=2, padding=1),
        )
        self.mix = nn.Conv2d(FRAMES * 48, width, 1)
        self.body = nn.Sequential(*(Residual(width, (1, 2, 4, 1)[i % 4]) for i in range(blocks)))
        self.sections = [1, len(self.names), len(self.colours), len(self.motions)]
        self.head = nn.Conv2d(width, sum(self.sections), 1, bias=False)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of cells.

        Args:
            clips: float[B, F, 3, P, P] in -1..1.

        Returns:
            Of a middle being there, float[B, G, G]; of things, float[B, N, G, G]; of colours,
            float[B, C, G, G]; of motions, float[B, M, G, G].
        """
        frames = functional.silu(self.stem(clips.flatten(0, 1)))  # [B * F, 48, G, G]
        states = self.body(self.mix(frames.unflatten(0, (-1, FRAMES)).flatten(1, 2)))
        maps = self.head(functional.silu(states))
        presence, names, colours, motions = maps.split(self.sections, dim=1)
        return presence[:, 0] + EMPTY, names, colours, motions


def detector_input(clips: NDArray[np.uint8]) -> Tensor:
    """Clips as the detector sees them, float[B, F, 3, P, P] in -1..1.

    Args:
        clips: uint8[B, F, H, W, 3].
    """
    frames = torch.tensor(clips).flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
    if frames.shape[-2:] != (SEEN, SEEN):
        frames = functional.interpolate(frames, (SEEN, SEEN), mode="bilinear", antialias=True)
    return frames.unflatten(0, clips.shape[:2])


class ClipJudge:
    """Finds things and their motions in clips.

    Args:
        detector: Trained weights.
    """

    def __init__(self, detector: ClipDetector):
        self.detector = detector.eval()

    @classmethod
    def load(cls, file: Path) -> ClipJudge:
        """A judge from a file of weights."""
        detector = ClipDetector()
        detector.load_state_dict({name: w.float() for name, w in load_file(file).items()})
        return cls(detector)

    @torch.inference_mode()
    def find(self, clips: NDArray[np.uint8]) -> list[list[MovingThing]]:
        """The things of each clip.

        Args:
            clips: uint8[B, F, H, W, 3].
        """
        presence, names, colours, motions = self.detector(detector_input(clips))
        found: list[list[MovingThing]] = [[] for _ in clips]
        for clip, row, column, confidence in peaks(presence):
            found[clip].append(
                MovingThing(
                    self.detector.names[int(names[clip, :, row, column].argmax())],
                    self.detector.colours[int(colours[clip, :, row, column].argmax())],
                    self.detector.motions[int(motions[clip, :, row, column].argmax())],
                    (column + 0.5) * CELL,
                    (row + 0.5) * CELL,
                    confidence,
                )
            )
        return found


@dataclass(frozen=True)
class ClipVerdict:
    """In what a clip is as it was asked for."""

    things: bool
    """The right things and nothing else."""
    motions: bool
    """Those, each with its motion."""
    colours: bool
    """Those, in the right colours."""

    @property
    def everything(self) -> bool:
        """Whether all is as it was asked for."""
        return self.things and self.motions and self.colours


def shows_clip(found: Sequence[MovingThing], clip: Clip) -> ClipVerdict:
    """Compare what is found in a clip with a description.

    Args:
        found: the things that the judge detects.
        clip: what was asked for. A colour that it leaves open may be any.
    """
    groups = clip.scene.groups
    if sorted(item.thing for item in found) != sorted(group.thing for group in groups):
        return ClipVerdict(False, False, False)
    by_thing = {item.thing: item for item in found}
    motions = all(
        by_thing[group.thing].motion == (motion or STILL)
        for group, motion in zip(groups, clip.motions, strict=True)
    )
    colours = all(group.colour in (None, by_thing[group.thing].colour) for group in groups)
    return ClipVerdict(True, motions, colours)
