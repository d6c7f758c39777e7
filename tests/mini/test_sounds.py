"""Soundscapes: order, loudness, pitch, repetition, and what they are called."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mmllm.mini.world.scenes import is_heldout
from mmllm.mini.world.sounds import (
    RATE,
    SAMPLES,
    Layout,
    Soundscape,
    Voice,
    combination,
    describe_soundscape,
    draw_training_soundscape,
    render_soundscape,
    sounds,
    soundscape_caption,
)


def wave(*voices: Voice, layout: Layout = "alone", seed: int = 0) -> np.ndarray:
    made = render_soundscape(Soundscape(voices, layout), random.Random(seed))
    assert made.shape == (SAMPLES,)
    assert np.abs(made).max() <= 1
    return made


def loudness(part: np.ndarray) -> float:
    return float(np.sqrt(np.square(part).mean()))


def middle_frequency(part: np.ndarray) -> float:
    power = np.square(np.abs(np.fft.rfft(part)))
    return float((power * np.fft.rfftfreq(len(part), 1 / RATE)).sum() / power.sum())


def test_takes_belong_to_one_split() -> None:
    assert len(sounds()) == 80
    for sound in sounds().values():
        assert len(sound.takes) == 6
        assert len(sound.heldout_takes) == 2
    heldout = render_soundscape(Soundscape((Voice("rain"),)), random.Random(0), heldout_takes=True)
    assert not any(np.array_equal(heldout, wave(Voice("rain"), seed=seed)) for seed in range(30))


def test_one_after_another_and_together() -> None:
    order = wave(Voice("rain"), Voice("piano"), layout="then")
    back = wave(Voice("piano"), Voice("rain"), layout="then")
    half = SAMPLES // 2
    rain, piano = middle_frequency(order[:half]), middle_frequency(order[half:])
    assert rain > 2 * piano
    assert middle_frequency(back[:half]) < middle_frequency(back[half:])
    both = wave(Voice("rain"), Voice("piano"), layout="together")
    assert piano < middle_frequency(both) < rain


def test_loud_and_soft_high_and_low() -> None:
    assert loudness(wave(Voice("cow", "loud"))) > 1.6 * loudness(wave(Voice("cow")))
    assert loudness(wave(Voice("cow"))) > 3 * loudness(wave(Voice("cow", "soft")))
    low, plain, high = (
        middle_frequency(wave(Voice("violin", pitch=pitch))) for pitch in ("low", None, "high")
    )
    assert low < 0.8 * plain < plain < 0.8 * high


@pytest.mark.parametrize("times", [2, 3])
def test_repetition(times: int) -> None:
    made = wave(Voice("cow", times=times))
    each = SAMPLES // times
    assert np.array_equal(made[:each], made[each : 2 * each])
    assert loudness(made[each - 300 : each]) == 0


def test_captions() -> None:
    cat, bell = Voice("cat"), Voice("church-bell", "soft")
    assert (
        describe_soundscape(Soundscape((cat, bell), "then")) == "a cat and then a soft church bell"
    )
    assert describe_soundscape(Soundscape((Voice("rain", pitch="low"),))) == "low rain"
    assert describe_soundscape(Soundscape((Voice("owl", times=2),))) == "an owl twice"
    assert describe_soundscape(Soundscape((Voice("owl", "loud"),))) == "a loud owl"
    rng = random.Random(0)
    both = Soundscape((cat, bell), "together")
    training = {soundscape_caption(both, rng) for _ in range(60)}
    assert not training & {soundscape_caption(both, rng, "heldout") for _ in range(60)}


def test_training_hears_no_heldout_pair() -> None:
    rng = random.Random(0)
    pairs = [combination(draw_training_soundscape(rng)) for _ in range(1000)]
    assert sum(pair is not None for pair in pairs) > 300
    assert not any(is_heldout(pair) for pair in pairs if pair)
