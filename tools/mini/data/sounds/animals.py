"""The synthesised sounds of animals: `(place, rng) -> float[<= N]`."""

from __future__ import annotations

import numpy as np

from tools.mini.data.sounds.synthesis import (
    between,
    hump,
    noise,
    put,
    saw,
    tone,
    voice,
)
from tools.mini.data.sounds.takes import RATE, TIME, N


def owl(place, rng):
    base, out = between(330, 430, place), np.zeros(N)
    for at, length in ((0.25, 0.3), (0.62, 0.2), (1.15, 0.75)):
        envelope = hump(at + length / 2 + rng.uniform(-0.03, 0.03), length)
        out += tone(base * (0.9 + 0.1 * envelope), (1, 0.15, 0.06)) * envelope
    return out + 0.01 * noise(rng, 200, 800)


def cricket(place, rng):
    chirp, rate = between(0.45, 0.7, place), between(28, 36, place)
    pulses = np.maximum(0, np.sin(2 * np.pi * rate * TIME)) ** 2
    phase = ((TIME + rng.uniform(0, 0.3)) / chirp) % 1
    gate = np.clip(np.minimum(phase, 0.6 - phase) / 0.05, 0, 1)
    return tone(between(4100, 4900, place) + 60 * np.sin(2 * np.pi * rate * TIME)) * pulses * gate


def frog(place, rng):
    out, base = np.zeros(N), between(85, 125, place)
    for at in np.arange(rng.uniform(0.1, 0.2), 1.8, between(0.75, 0.5, place)):
        envelope = hump(at + 0.17, 0.36)
        pulses = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * 38 * TIME))
        rise = base * (1 + 0.4 * np.clip((TIME - at) / 0.36, 0, 1))
        out += voice(rise, [(500, 110), (1350 + 300 * envelope, 180)]) * envelope * pulses
    return out


def bee(place, rng):
    drift = 1 + 0.05 * np.cumsum(noise(rng, 0.5, 3)) / RATE * 8
    near = 0.35 + hump(rng.uniform(0.8, 1.2), 2.4)
    return tone(between(190, 250, place) * drift * (0.95 + 0.06 * near), saw(20, 0.7)) * near


def wolf(place, rng):
    rise = np.interp(TIME, [0, 0.5, 1.4, 2.05], [0.62, 1.0, 0.97, 0.7])
    vibrato = 1 + 0.012 * np.sin(2 * np.pi * 5.5 * TIME + rng.uniform(0, 6))
    pitch = between(420, 580, place) * rise * vibrato
    howl = voice(pitch, [(600, 260), (1150, 300)])
    return howl * np.interp(TIME, [0, 0.25, 1.5, 2.0], [0, 1, 0.9, 0])


def rattlesnake(place, rng):
    rate = between(42, 62, place) * (1 + 0.04 * np.sin(2 * np.pi * 1.5 * TIME + rng.uniform(0, 6)))
    shake = np.maximum(0, np.sin(2 * np.pi * np.cumsum(rate) / RATE)) ** 4
    return noise(rng, 3500, 7500) * shake * np.interp(TIME, [0, 0.3, 1.7, 2.05], [0, 1, 1, 0.3])


def cow(place, rng):
    pitch = between(105, 150, place) * np.interp(TIME, [0, 0.4, 1.4, 2.05], [0.8, 1, 1.05, 0.75])
    mouth = np.interp(TIME, [0, 0.5, 1.5, 2.0], [0, 1, 1, 0.3])
    growl = 1 + 0.25 * noise(rng, 15, 50)
    moo = voice(pitch, [(280 + 280 * mouth, 90), (700 + 350 * mouth, 140), (2300, 400)])
    return moo * growl * np.interp(TIME, [0, 0.15, 1.6, 1.95], [0, 1, 0.9, 0])


def cat(place, rng):
    start, length = rng.uniform(0.1, 0.25), between(0.9, 1.3, place)
    u = np.clip((TIME - start) / length, 0, 1)
    pitch = between(480, 680, place) * np.interp(u, [0, 0.3, 0.6, 1], [0.85, 1.2, 1.1, 0.75])
    mouth = np.interp(u, [0, 0.15, 0.4, 0.8, 1], [0, 0.2, 1, 0.6, 0])
    meow = voice(pitch, [(500 + 700 * mouth, 200), (2600 - 1100 * u, 350), (3800, 500)])
    return meow * np.interp(u, [0, 0.1, 0.4, 0.85, 1], [0, 0.7, 1, 0.6, 0])


def sheep(place, rng):
    tremble = np.sin(2 * np.pi * between(7, 10, place) * TIME + rng.uniform(0, 6))
    pitch = (
        between(250, 360, place) * (1 + 0.06 * tremble) * np.interp(TIME, [0, 1.5], [1.05, 0.92])
    )
    bleat = voice(pitch, [(800, 160), (1750, 220), (2900, 400)]) * (1 + 0.6 * tremble)
    return bleat * np.interp(TIME, [0, 0.1, 0.16, 1.1, 1.5], [0, 0.2, 1, 0.8, 0])


def duck(place, rng):
    out = np.zeros(N)
    for at in np.arange(rng.uniform(0.05, 0.12), 1.8, between(0.5, 0.33, place)):
        u = np.clip((TIME - at) / 0.2, 0, 1)
        pitch = between(190, 260, place) * (1.1 - 0.25 * u)
        out += voice(pitch, [(1050, 150), (2300, 250), (3400, 300)]) * np.sin(np.pi * u) ** 0.6
    return out * (1 + 0.2 * noise(rng, 50, 200))


def whale(place, rng):
    points = rng.uniform(0.8, 1.25, 5)
    pitch = between(150, 260, place) * np.interp(
        TIME, np.linspace(0, 2.05, 5), points * [0.7, 1.3, 0.9, 1.5, 0.8]
    )
    pitch = np.convolve(
        np.pad(pitch, 800, mode="edge"),
        np.hanning(1601) / np.hanning(1601).sum(),
        "valid",
    )[:N]
    song = tone(pitch, (1, 0.5, 0.3, 0.1)) * np.interp(TIME, [0, 0.3, 1.7, 2.05], [0, 1, 1, 0])
    return song + 0.3 * np.roll(song, 2900) + 0.02 * noise(rng, 50, 300)


def chick(place, rng):
    out, at = np.zeros(N), rng.uniform(0.03, 0.1)
    while at < 1.95:
        time = np.arange(1600) / RATE
        pitch = rng.uniform(0.95, 1.05) * between(3300, 4100, place) * (1.2 - 4.5 * time)
        put(out, at, np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * np.hanning(1600))
        at += rng.uniform(0.2, 0.32) / between(0.9, 1.2, place)
    return out
