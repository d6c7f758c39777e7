"""A judge of soundscapes: a small classifier that names the sounds of a recording and their order.

It is trained on log-mel spectrograms of renderings of mini's world
(`tools/mini/world/soundscape_judge.py`) and shares nothing with mini.

Dimensions: B recordings of S samples, T = 128 spectrogram frames, N sounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mmllm.evaluation.scene_judge import Residual
from mmllm.mini.world.sounds import (
    RATE,
    SAMPLES,
    Layout,
    Loudness,
    Pitch,
    Soundscape,
    Voice,
    sounds,
)

MELS, HOP = 64, 256
LAYOUTS: tuple[Layout, ...] = ("alone", "then", "together")
LOUDNESSES: tuple[Loudness | None, ...] = (None, "loud", "soft")
PITCHES: tuple[Pitch | None, ...] = (None, "high", "low")
TIMES = (1, 2, 3)
_FLOOR = 1e-3  # added to mel power (peak amplitude 1) before the logarithm


class SoundscapeLogits(NamedTuple):
    """What the classifier says of each recording."""

    sounds: Tensor
    """float[B, 3, N]: in the whole, in the first half, in the second half."""
    layout: Tensor
    """float[B, 3], of LAYOUTS; so are those below of theirs."""
    loudness: Tensor
    pitch: Tensor
    times: Tensor


class SoundscapeClassifier(nn.Module):
    """Spectrograms -> sounds in the whole and in its halves, layout, and how a single one is."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.names = list(sounds())
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, width, 4, stride=2, padding=1),
            Residual(width, 1),
            Residual(width, 2),
            nn.SiLU(),
        )
        self.collapse = nn.Conv2d(width, 2 * width, (MELS // 4, 1))  # all frequencies in one
        self.dropout = nn.Dropout(0.2)
        self.sounds = nn.Linear(4 * width, len(self.names))
        self.sections = [len(LAYOUTS), len(LOUDNESSES), len(PITCHES), len(TIMES)]
        self.form = nn.Linear(3 * 4 * width, sum(self.sections))

    def forward(self, spectrograms: Tensor) -> SoundscapeLogits:
        """Logits of each recording.

        Args:
            spectrograms: float[B, MELS, T], as `log_mel` gives them.
        """
        states = functional.silu(self.collapse(self.stem(spectrograms[:, None])))[:, :, 0]
        first, second = states.chunk(2, dim=2)  # the two sounds of "then" share time evenly
        parts = torch.stack(
            [torch.cat([part.mean(2), part.amax(2)], 1) for part in (states, first, second)], 1
        )  # [B, 3, 4 * width]
        parts = self.dropout(parts)
        return SoundscapeLogits(
            self.sounds(parts), *self.form(parts.flatten(1)).split(self.sections, dim=1)
        )


def log_mel(waves: Tensor) -> Tensor:
    """Log-mel spectrograms, about -1..1: float[B, S] at RATE -> float[B, MELS, T]."""
    bands = _mel()(waves)[..., : SAMPLES // HOP]
    return (bands + _FLOOR).log() / 6


@functools.cache
def _mel() -> Callable[[Tensor], Tensor]:
    import torchaudio

    return torchaudio.transforms.MelSpectrogram(
        RATE, n_fft=1024, hop_length=HOP, n_mels=MELS, f_min=40.0, f_max=RATE / 2
    )


class SoundscapeJudge:
    """Names what sounds in recordings.

    Args:
        classifier: Trained weights.
    """

    def __init__(self, classifier: SoundscapeClassifier):
        self.classifier = classifier.eval()

    @classmethod
    def load(cls, file: Path) -> SoundscapeJudge:
        """A judge from a file of weights."""
        classifier = SoundscapeClassifier()
        classifier.load_state_dict({name: w.float() for name, w in load_file(file).items()})
        return cls(classifier)

    @torch.inference_mode()
    def find(self, waves: NDArray[np.float32]) -> list[Soundscape]:
        """What sounds in each recording; voices of "together" in no order.

        Args:
            waves: float32[B, S] in -1..1 at RATE.
        """
        logits = self.classifier(log_mel(torch.from_numpy(waves)))
        return [self._decide(*row) for row in zip(*logits, strict=True)]

    def _decide(
        self, named: Tensor, layout: Tensor, loudness: Tensor, pitch: Tensor, times: Tensor
    ) -> Soundscape:
        whole, first, second = named
        match LAYOUTS[int(layout.argmax())]:
            case "alone":
                voice = Voice(
                    self.classifier.names[int(whole.argmax())],
                    LOUDNESSES[int(loudness.argmax())],
                    PITCHES[int(pitch.argmax())],
                    TIMES[int(times.argmax())],
                )
                return Soundscape((voice,))
            case "then":
                indices = [int(first.argmax()), int(second.argmax())]
                order: Layout = "then"
            case "together":
                indices = whole.topk(2).indices.tolist()
                order = "together"
        return Soundscape(tuple(Voice(self.classifier.names[i]) for i in indices), order)
