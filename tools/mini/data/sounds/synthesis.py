"""The building blocks of synthesised sounds."""

from __future__ import annotations

import numpy as np

from tools.mini.data.sounds.takes import RATE, TIME, N


def put(out: np.ndarray, at: float, sound: np.ndarray) -> None:
    """Adds `sound` to `out` from `at` seconds on; what reaches over the end is cut."""
    start = round(at * RATE)
    stop = min(len(out), start + len(sound))
    if 0 <= start < stop:
        out[start:stop] += sound[: stop - start]


def tone(pitch: np.ndarray | float, weights: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """Harmonics of a moving pitch in Hz, each silent where it would pass 7.6 kHz."""
    pitch = np.broadcast_to(pitch, N) if np.ndim(pitch) == 0 else pitch
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    parts = [w * np.sin(k * phase) * (k * pitch < 7600) for k, w in enumerate(weights, 1)]
    return np.sum(parts, axis=0)


def saw(count: int, power: float = 1.0) -> tuple[float, ...]:
    return tuple(k**-power for k in range(1, count + 1))


def square(count: int) -> tuple[float, ...]:
    return tuple(k % 2 / k for k in range(1, count + 1))


def noise(rng: np.random.Generator, low: float, high: float, length: int = N) -> np.ndarray:
    """Noise between two frequencies, soft edges, unit RMS."""
    frequencies = np.fft.rfftfreq(length, 1 / RATE)
    shape = 1 / (1 + (low / np.maximum(frequencies, 1)) ** 6) / (1 + (frequencies / high) ** 6)
    out = np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * shape, length)
    return out / np.sqrt(np.mean(out**2))


def decay(seconds: float, attack: float = 0.002, length: float = 1.0) -> np.ndarray:
    """Envelope: linear attack, then exponential fall (to 1/e in `seconds`)."""
    time = np.arange(round(length * RATE)) / RATE
    return np.minimum(1, time / attack) * np.exp(-time / seconds)


def hump(centre: float, width: float) -> np.ndarray:
    """Smooth bump over the take, `width` seconds wide: float[N] in [0, 1]."""
    distance = np.clip((TIME - centre) / width, -0.5, 0.5)
    return np.cos(np.pi * distance) ** 2


def ringing(pitches: list[float], fall: float, length: float = 1.2) -> np.ndarray:
    """A struck body: one decaying sine per mode, high modes fall faster."""
    time = np.arange(round(length * RATE)) / RATE
    modes = [
        np.sin(2 * np.pi * p * time) * np.exp(-time / fall * (p / pitches[0]) ** 0.5) / (i + 1)
        for i, p in enumerate(pitches)
        if p < 7600
    ]
    return np.sum(modes, axis=0)


def voice(pitch: np.ndarray, formants: list[tuple[float | np.ndarray, float]]) -> np.ndarray:
    """A throat: harmonics of `pitch` float[N] shaped by (centre, width) resonances in Hz."""
    phase, out = 2 * np.pi * np.cumsum(pitch) / RATE, np.zeros(N)
    for k in range(1, int(7600 / pitch.min()) + 1):
        gain = sum(1 / (1 + ((k * pitch - centre) / width) ** 2) for centre, width in formants)
        out += gain * np.sin(k * phase) / k**0.5 * (k * pitch < 7600)
    return out


def between(low: float, high: float, place: float) -> float:
    return low * (high / low) ** place
