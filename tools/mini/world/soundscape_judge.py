"""Trains the judge of soundscapes: which sounds, in which order, how loud, how high, how often.

    python -m tools.mini.world.soundscape_judge --run runs/judge-soundscape --minutes 15

Held-out pairs are in its training: it measures, and is measured itself on takes that it never had.
Recordings get a little noise, another gain, a shift in time and a gap in their frequencies.

Dimensions: B recordings of S samples.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmllm.evaluation.soundscape_judge import (
    LAYOUTS,
    LOUDNESSES,
    PITCHES,
    TIMES,
    SoundscapeClassifier,
    SoundscapeJudge,
    log_mel,
)
from mmllm.kernels.precision import fast_autocast
from mmllm.mini.world.sounds import Soundscape, Voice, draw_soundscape, render_soundscape
from tools.mini.world.judge_weights import ship
from tools.mini.world.run import Run, parse_run, train

BATCH, LEARNING_RATE = 32, 2e-3
NUM_MEASURED = 600
"""Renderings that a judge is measured on."""
MAX_SHIFT = 800  # samples


def changed(wave: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
    """A recording as float[S] with noise, another gain and shifted in time."""
    shifted = functional.pad(wave, (rng.randrange(MAX_SHIFT), 0))[: len(wave)]
    noise = torch.randn(wave.shape, generator=generator) * 10 ** rng.uniform(-4.5, -2.5)
    return shifted * rng.uniform(0.9, 1.1) + noise


class Loss:
    """The loss of a step: cross-entropy of the sounds of each layout, and of the rest."""

    def __init__(self, classifier: SoundscapeClassifier, seed: int):
        self.classifier, self.seed = classifier, seed

    def __call__(self, step: int, share: float) -> Tensor:
        rng = random.Random(f"{self.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        scapes = [draw_soundscape(rng) for _ in range(BATCH)]
        waves = [torch.from_numpy(render_soundscape(scape, rng)) for scape in scapes]
        spectrograms = log_mel(torch.stack([changed(wave, rng, generator) for wave in waves]))
        for spectrogram in spectrograms:
            lowest = rng.randrange(60)
            spectrogram[lowest : lowest + rng.randrange(6)] = spectrogram.mean()
        with fast_autocast("cpu"):
            logits = self.classifier(spectrograms)
        layouts = torch.tensor([LAYOUTS.index(scape.layout) for scape in scapes])
        alone = layouts == LAYOUTS.index("alone")
        first = [scape.voices[0] for scape in scapes]
        loss = functional.cross_entropy(logits.layout.float(), layouts)
        loss = loss + self._sounds(logits.sounds.float(), scapes)
        for values, targets in (
            (logits.loudness, [LOUDNESSES.index(voice.loudness) for voice in first]),
            (logits.pitch, [PITCHES.index(voice.pitch) for voice in first]),
            (logits.times, [TIMES.index(voice.times) for voice in first]),
        ):
            each = functional.cross_entropy(values.float(), torch.tensor(targets), reduction="none")
            loss = loss + (each * alone).sum() / BATCH
        return loss

    def _sounds(self, logits: Tensor, scapes: list[Soundscape]) -> Tensor:
        """Of "then" each half names its sound; else the whole names all, with even shares."""
        names = self.classifier.names
        share = torch.zeros(logits.shape)  # [B, 3, N]
        for index, scape in enumerate(scapes):
            for number, voice in enumerate(scape.voices):
                part = 1 + number if scape.layout == "then" else 0
                weight = 0.5 if scape.layout == "together" else 1.0
                share[index, part, names.index(voice.sound)] = weight
        return -(share * logits.log_softmax(-1)).sum() / len(scapes)


def measure(file: Path) -> dict[str, float]:
    """Share of renderings of takes that training never has that are read right, by attribute.

    Args:
        file: Weights of a judge.
    """
    judge = SoundscapeJudge.load(file)
    rng = random.Random("measure soundscapes")
    scapes = [draw_soundscape(rng) for _ in range(NUM_MEASURED)]
    waves = np.stack([render_soundscape(scape, rng, heldout_takes=True) for scape in scapes])
    pairs = list(zip(judge.find(waves), scapes, strict=True))
    right: dict[str, list[bool]] = {"layout": [found.layout == s.layout for found, s in pairs]}
    for found, scape in pairs:
        one, other = ([voice.sound for voice in some.voices] for some in (found, scape))
        if scape.layout == "together":
            one.sort()
            other.sort()
        right.setdefault(f"sounds, {scape.layout}", []).append(one == other)
        if scape.layout == "alone":
            for name in ("loudness", "pitch", "times"):
                asked = getattr(scape.voices[0], name)
                if asked not in (None, 1):
                    same = getattr(found.voices[0], name) == asked
                    right.setdefault(f"{name}, {asked}", []).append(same)
            if scape.voices[0] == Voice(scape.voices[0].sound):
                right.setdefault("plain", []).append(found == scape)
    return {name: float(np.mean(flags)) for name, flags in sorted(right.items())}


def look(run: Run) -> None:
    """Write the weights, their scores and the card."""
    ship(
        run,
        SoundscapeClassifier(),
        "soundscape",
        measure,
        what="Names the sounds of a recording, their order, and how loud, high and often one is.",
        source="renderings of soundscapes (`mmllm/mini/world/sounds.py`), held-out pairs included, "
        "held-out takes not; sources of the sounds: `mmllm/mini/data/SOUNDS.md`",
        command="python -m tools.mini.world.soundscape_judge",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the judge of soundscapes.")
    parser.add_argument("--run", type=Path, required=True, help="an existing one goes on")
    arguments, progress = parse_run(parser, minutes=15)
    arguments.run.mkdir(parents=True, exist_ok=True)
    classifier: Any = SoundscapeClassifier().train()
    run = Run(arguments.run, classifier, progress, LEARNING_RATE)
    train(run, Loss(classifier, arguments.seed), look, arguments.every)


if __name__ == "__main__":
    main()
