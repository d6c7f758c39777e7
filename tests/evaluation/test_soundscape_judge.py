"""How the judge of soundscapes decides, and that its spectrograms tell halves and levels."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmllm.evaluation.soundscape_judge import (
    HOP,
    LAYOUTS,
    LOUDNESSES,
    MELS,
    PITCHES,
    SoundscapeClassifier,
    SoundscapeJudge,
    SoundscapeLogits,
    log_mel,
)
from mmllm.mini.world.sounds import SAMPLES, Soundscape, Voice, render_soundscape, sounds

NAMES = list(sounds())
WAVES = np.zeros((1, SAMPLES), np.float32)


def certain(scape: Soundscape) -> SoundscapeLogits:
    """The logits of a classifier that is sure of a soundscape."""
    named = torch.zeros(1, 3, len(NAMES))
    for number, voice in enumerate(scape.voices):
        part = 1 + number if scape.layout == "then" else 0
        named[0, part, NAMES.index(voice.sound)] = 5
    voice = scape.voices[0]
    chosen = (
        LAYOUTS.index(scape.layout),
        LOUDNESSES.index(voice.loudness),
        PITCHES.index(voice.pitch),
        voice.times - 1,
    )
    return SoundscapeLogits(named, *(torch.eye(3)[index : index + 1] for index in chosen))


@pytest.mark.parametrize(
    "scape",
    [
        Soundscape((Voice("piano"),)),
        Soundscape((Voice("piano", "soft"),)),
        Soundscape((Voice("rain", pitch="low", times=3),)),
        Soundscape((Voice("rain"), Voice("piano")), "then"),
        Soundscape((Voice("piano"), Voice("rain")), "then"),
    ],
)
def test_what_is_likeliest_is_named(scape: Soundscape, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = SoundscapeJudge(SoundscapeClassifier(width=8))
    monkeypatch.setattr(judge.classifier, "forward", lambda _: certain(scape))
    assert judge.find(WAVES) == [scape]


def test_sounds_at_once_are_in_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = SoundscapeJudge(SoundscapeClassifier(width=8))
    scape = Soundscape((Voice("rain"), Voice("piano")), "together")
    monkeypatch.setattr(judge.classifier, "forward", lambda _: certain(scape))
    (found,) = judge.find(WAVES)
    assert found.layout == "together"
    assert {voice.sound for voice in found.voices} == {"rain", "piano"}


def test_spectrograms_have_the_halves_of_a_sequence_and_the_level() -> None:
    one, other = Voice("piano"), Voice("rain")
    rng = random.Random(0)
    waves = [
        render_soundscape(Soundscape((one, other), "then"), random.Random(0)),
        render_soundscape(Soundscape((Voice("piano", "loud"),)), rng),
        render_soundscape(Soundscape((Voice("piano", "soft"),)), rng),
    ]
    bands = log_mel(torch.from_numpy(np.stack(waves)))
    assert bands.shape == (3, MELS, SAMPLES // HOP)
    first = waves[0].copy()
    first[SAMPLES // 2 :] = 0
    alone = log_mel(torch.from_numpy(first[None]))[0]
    half = SAMPLES // HOP // 2
    assert torch.allclose(alone[:, : half - 2], bands[0, :, : half - 2], atol=1e-5)
    assert alone[:, half + 3 :].max() < bands[0, :, half + 3 :].max()
    assert bands[1].max() > bands[2].max() + 0.3


def test_weights_come_back_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = SoundscapeClassifier().eval()
    assert sum(weight.numel() for weight in classifier.parameters()) < 600_000
    file = tmp_path / "soundscape.safetensors"
    save_file({n: w.half().contiguous() for n, w in classifier.state_dict().items()}, file)
    bands = torch.randn(2, MELS, SAMPLES // HOP)
    again = SoundscapeJudge.load(file).classifier
    for one, other in zip(classifier(bands), again(bands), strict=True):
        assert torch.allclose(one, other, atol=0.05)
