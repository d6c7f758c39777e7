"""What varies from take to take of a sound.

Shapes: N = 32,768 samples at 16 kHz (2.048 s), mono, peak -1 dBFS.
"""

from __future__ import annotations

import numpy as np

RATE, N = 16_000, 32_768
PEAK, FADE = 10 ** (-1 / 20), 1_600  # -1 dBFS; the last 0.1 s fades out
RENDER_RATE = 48_000  # rendered three times too fast, then filtered down: no aliasing
SLOT = 6.0  # seconds of MIDI per take, so that no tail reaches the next one
TIME = np.arange(N) / RATE
# What varies from take to take. Columns 6 and 7 are the held-out takes.
SPLITS = ["train"] * 6 + ["heldout_take"] * 2
PLACE = [
    0.0,
    0.2,
    0.4,
    0.6,
    0.8,
    1.0,
    0.3,
    0.7,
]  # where in its range (pitch, rate) a take lies
TEMPO = [
    1.00,
    1.12,
    0.90,
    1.06,
    0.94,
    1.18,
    1.03,
    0.97,
]  # factor on the speed of the phrase
VELOCITY = [88, 112, 72, 104, 80, 120, 96, 108]  # MIDI key velocity
CENTS = [0, -60, 40, -30, 70, 20, 10, -45]  # detuning of unpitched percussion
START = [
    0.02,
    0.05,
    0.00,
    0.08,
    0.03,
    0.06,
    0.04,
    0.01,
]  # seconds before the first note
