"""The synthesised sounds: `(place, rng) -> float[<= N]`. Animals have a file of their own."""

from __future__ import annotations

import numpy as np

from tools.mini.data.sounds.animals import (
    bee,
    cat,
    chick,
    cow,
    cricket,
    duck,
    frog,
    owl,
    rattlesnake,
    sheep,
    whale,
    wolf,
)
from tools.mini.data.sounds.synthesis import (
    between,
    decay,
    noise,
    put,
    ringing,
    saw,
    square,
    tone,
)
from tools.mini.data.sounds.takes import RATE, TIME, N


def siren(place, rng):
    sweep = 0.5 - 0.5 * np.cos(2 * np.pi * between(0.7, 1.3, place) * TIME + rng.uniform(0, 1))
    return tone(between(550, 700, place) * 2.2**sweep, saw(6, 1.3))


def ambulance(place, rng):
    beat, low = between(0.45, 0.6, place), between(420, 480, place)
    high = (np.floor(TIME / beat + rng.uniform(0, 1)) % 2).astype(bool)
    return tone(np.where(high, 4 / 3 * low, low), square(9))


def heartbeat(place, rng):
    out, period = np.zeros(N), between(1.0, 0.6, place)
    for at in np.arange(rng.uniform(0.05, 0.2), 2, period):
        for delay, pitch, gain in ((0, 48, 1.0), (0.3 * period**0.5, 62, 0.7)):
            time = np.arange(3200) / RATE
            thump = np.sin(2 * np.pi * pitch * time * (1 - 0.8 * time)) * np.exp(-time / 0.05)
            put(out, at + delay, gain * thump * np.minimum(1, time / 0.008))
            put(
                out,
                at + delay,
                0.15 * gain * noise(rng, 60, 220, 1600) * decay(0.02, 0.005, 0.1),
            )
    return out


def alarm_clock(place, rng):
    gate, beep = np.zeros(N), 0.07 * between(0.85, 1.2, place)
    for start in np.arange(rng.uniform(0.02, 0.2), 2, 12 * beep):
        for i in range(4):
            gate += (start + 2 * i * beep <= TIME) & (start + (2 * i + 1) * beep > TIME)
    return tone(between(1900, 2300, place), square(5)) * gate


def ticking_clock(place, rng):
    out, period = np.zeros(N), between(0.5, 0.25, place)
    for i, at in enumerate(np.arange(rng.uniform(0.02, 0.15), 2, period)):
        body = [2100, 3300, 5200] if i % 2 else [1700, 2700, 4300]
        put(out, at, ringing([p * between(0.92, 1.08, place) for p in body], 0.008, 0.1))
        put(out, at + 0.012, 0.4 * ringing([p * 1.1 for p in body], 0.006, 0.1))
    return out


def rain(place, rng):
    out = 0.12 * noise(rng, 1500, 7000)
    for _ in range(int(between(150, 400, place))):
        size = rng.uniform(0.02, 0.4)
        drop = noise(rng, 1000, 6500, 320) * decay(0.003, 0.0005, 0.02)
        put(out, rng.uniform(0, 2.04), size * drop)
    return out


def thunder(place, rng):
    out, start = np.zeros(N), rng.uniform(0.02, 0.15)
    for _ in range(9):
        at = start + rng.exponential(0.18)
        put(
            out,
            at,
            rng.uniform(0.4, 1)
            * noise(rng, 40, between(500, 1500, place))
            * decay(0.15, 0.004, 2.048),
        )
    rumble = noise(rng, 30, between(110, 160, place)) * np.abs(1 + 0.6 * noise(rng, 1, 4))
    return out + 1.6 * rumble * np.minimum(1, np.maximum(0, TIME - start) / 0.2) * np.exp(
        -TIME / 1.2
    )


def wind(place, rng):
    out, gust = np.zeros(N), np.cumsum(noise(rng, 0.3, 1.2))
    gust = (gust - gust.min()) / np.ptp(gust)
    for i, centre in enumerate(np.geomspace(250, between(900, 1300, place), 6)):
        out += noise(rng, 0.9 * centre, 1.1 * centre) * np.exp(-(((gust * 5 - i) / 1.1) ** 2))
    return out * (0.3 + gust) + 0.1 * noise(rng, 100, 500)


def fire(place, rng):
    out = 0.05 * noise(rng, 60, 900) * (1 + 0.4 * noise(rng, 1, 8))
    for _ in range(int(between(28, 60, place))):
        pop = noise(rng, rng.uniform(600, 2500), 7000, 400)
        put(
            out,
            rng.uniform(0, 2),
            rng.uniform(0.05, 1) ** 2 * pop * decay(0.003, 0.0004, 0.025),
        )
    return out


def car_horn(place, rng):
    base, gate = between(370, 440, place), np.zeros(N)
    lengths = [(0.05, 0.35), (0.5, 1.2)] if rng.random() < 0.5 else [(0.05, 1.4)]
    for start, length in lengths:
        gate += np.clip(np.minimum(TIME - start, start + length - TIME) / 0.02, 0, 1)
    reed = tuple(1 / (1 + ((k - 5) / 3) ** 2) for k in range(1, 17))
    return (tone(base, reed) + tone(1.26 * base, reed)) * gate


def ship_horn(place, rng):
    base = between(75, 125, place) * (1 - 0.15 * np.exp(-TIME / 0.08))
    breath = 0.15 * noise(rng, 100, 600)
    body = tone(base, saw(14, 0.8)) + 0.7 * tone(1.5 * base, saw(9, 0.9))
    return (body + breath) * np.clip(TIME / 0.15, 0, 1) * np.clip((1.9 - TIME) / 0.2, 0, 1)


def steam_train(place, rng):
    out = np.zeros(N)
    for i, at in enumerate(np.arange(0.02, 2, between(0.32, 0.18, place))):
        chuff = noise(rng, 200, 3000, 4800) * decay(0.06, 0.02, 0.3)
        put(out, at, (0.55 if i % 4 else 0.9) * chuff)
    start = rng.uniform(0.3, 0.6)
    pitch = between(520, 620, place) * (1 - 0.1 * np.exp(-np.maximum(0, TIME - start) / 0.06))
    chord = sum(tone(pitch * ratio, (1, 0.4, 0.2)) for ratio in (1, 1.19, 1.5))
    steam = chord + 0.5 * noise(rng, 1500, 6000)
    return out + 0.5 * steam * np.clip(np.minimum(TIME - start, start + 1.0 - TIME) / 0.06, 0, 1)


def water_drop(place, rng):
    out = np.zeros(N)
    for at in np.arange(rng.uniform(0.02, 0.1), 1.9, between(0.75, 0.4, place)):
        time = np.arange(2400) / RATE
        pitch = rng.uniform(0.9, 1.1) * between(700, 1100, place) * (1 + 9 * time)
        drop = np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * np.exp(-time / 0.03)
        put(out, at, drop * np.minimum(1, time / 0.003))
        put(out, at + 0.11, 0.25 * drop)
    return out


def camera(place, rng):
    out, open_time = np.zeros(N), between(0.07, 0.14, place)
    for at in (
        0.15,
        0.15 + between(0.6, 0.9, place),
        0.15 + 2 * between(0.6, 0.9, place),
    ):
        for delay, gain in ((0, 1.0), (open_time, 0.8)):
            click = ringing([1500, 2700, 4600], 0.006, 0.06)
            click += 0.8 * noise(rng, 2000, 7500, 960) * decay(0.01, 0.0005, 0.06)
            put(out, at + delay, gain * click)
        motor = tone(between(330, 420, place), saw(10, 0.6))[:3200] * np.hanning(3200)
        put(
            out,
            at + open_time + 0.03,
            0.12 * motor + 0.06 * noise(rng, 1000, 5000, 3200) * np.hanning(3200),
        )
    return out


def knock_on_a_door(place, rng):
    out, gap = np.zeros(N), between(0.3, 0.17, place)
    for group in (0.05, 0.05 + 5.2 * gap):
        for i in range(3):
            wood = [between(150, 210, place), 330, 480, 790]
            hit = ringing([p * rng.uniform(0.98, 1.02) for p in wood], 0.03, 0.3)
            hit[:400] += 0.4 * noise(rng, 400, 3000, 400) * decay(0.004, 0.0005, 0.025)
            put(out, group + i * gap, rng.uniform(0.8, 1) * hit)
    return out


def ping_pong_ball(place, rng):
    out, at, gap = np.zeros(N), rng.uniform(0.02, 0.08), between(0.34, 0.46, place)
    gain, pitch = 1.0, between(1050, 1350, place)
    while at < 2 and gap > 0.02:
        put(out, at, gain * ringing([pitch, 2.3 * pitch, 4.1 * pitch], 0.012, 0.12))
        at, gap, gain = at + gap, 0.82 * gap, 0.88 * gain
    return out


def basketball(place, rng):
    out = np.zeros(N)
    for at in np.arange(rng.uniform(0.03, 0.1), 2, between(0.62, 0.38, place)):
        bounce = ringing([between(85, 110, place), 190, 610], 0.07, 0.4)
        bounce[:800] += 0.5 * noise(rng, 200, 1800, 800) * decay(0.008, 0.001, 0.05)
        put(out, at, bounce)
        put(out, at + 0.004, 0.25 * ringing([between(880, 1010, place)], 0.12, 0.4))
    return out


def hammer(place, rng):
    out = np.zeros(N)
    for at in np.arange(0.05, 1.9, between(0.62, 0.42, place)):
        steel = between(1500, 1900, place)
        clank = ringing([steel, 1.62 * steel, 2.41 * steel, 3.3 * steel], 0.09, 0.6)
        clank[:600] += 1.2 * noise(rng, 500, 6000, 600) * decay(0.006, 0.0004, 600 / RATE)
        put(out, at + rng.uniform(-0.01, 0.01), clank)
    return out


def hand_saw(place, rng):
    stroke = between(0.42, 0.28, place)
    phase = (TIME + rng.uniform(0, 0.1)) / stroke
    teeth = 0.5 + 0.5 * np.sin(2 * np.pi * between(85, 130, place) * TIME)
    push = np.where(np.floor(phase) % 2 == 0, 1.0, 0.55) * np.sin(np.pi * (phase % 1)) ** 0.7
    return (
        (
            noise(rng, 1200, 3500) * (np.floor(phase) % 2 == 0)
            + noise(rng, 2200, 6000) * (np.floor(phase) % 2)
        )
        * push
        * teeth
    )


def rocket(place, rng):
    swell = np.interp(TIME, [0, 0.25, 1.2, 2.05], [0.15, 0.8, 1, 0.8])
    roar = noise(rng, 40, between(350, 600, place)) + 0.35 * noise(rng, 500, 5000)
    return roar * swell * (1 + 0.5 * np.abs(noise(rng, 15, 40)))


def fireworks(place, rng):
    out, bang = np.zeros(N), between(0.75, 1.05, place)
    rise = between(1300, 1700, place) * (1 + 0.9 * TIME / bang)
    out += 0.3 * tone(rise) * (bang - 0.05 > TIME) * np.clip(TIME / 0.1, 0, 1)
    put(out, bang, 1.5 * noise(rng, 40, 900) * decay(0.12, 0.002, 2.048))
    for _ in range(45):
        crack = noise(rng, 1500, 7500, 240) * decay(0.003, 0.0003, 0.015)
        put(out, bang + 0.15 + rng.exponential(0.3), rng.uniform(0.2, 0.8) * crack)
    return out


def flying_saucer(place, rng):
    wobble = np.sin(2 * np.pi * between(5, 8, place) * TIME + rng.uniform(0, 6))
    glide = np.interp(TIME, [0, 1, 2.05], [0.8, 1.25, 0.9])
    return tone(between(700, 1000, place) * glide * (1 + 0.16 * wobble), (1, 0.25, 0.1))


def motorcycle(place, rng):
    rev = np.interp(TIME, [0, 0.4, 0.9, 1.3, 1.7, 2.05], [0.5, 0.55, 1.3, 0.8, 1.5, 0.9])
    rate = between(38, 52, place) * rev
    firing = np.exp(-8 * (np.cumsum(rate) / RATE % 1)) + 0.6 * np.exp(
        -8 * ((np.cumsum(rate) / RATE + 0.4) % 1)
    )
    return (firing - firing.mean()) * (1 + 0.5 * noise(rng, 100, 3000)) + 0.5 * tone(
        rate, saw(30, 0.6)
    ) * 0.3


def radio_static(place, rng):
    sweep = np.interp(TIME, np.linspace(0, 2.05, 6), rng.uniform(500, 3500, 6))
    crackle = noise(rng, 800, 5500) * (0.5 + 0.5 * (noise(rng, 2, 12) > 0.3))
    return crackle + between(0.7, 1.2, place) * tone(sweep) * np.abs(np.sin(2 * np.pi * 1.1 * TIME))


def video_game(place, rng):
    out, step = np.zeros(N), between(0.11, 0.085, place)
    scale = [
        [0, 4, 7, 12, 16, 19, 24],
        [0, 7, 12, 7, 12, 19, 24],
        [12, 7, 4, 7, 12, 16, 24],
    ]
    melody = scale[rng.integers(3)] * 3
    for i, semitone in enumerate(melody[: int(2 / step)]):
        pitch = between(330, 495, place) * 2 ** (semitone / 12)
        time = np.arange(round(step * RATE * 0.9))
        put(
            out,
            i * step,
            tone(pitch, square(11))[: len(time)] * np.linspace(1, 0.5, len(time)),
        )
    return out


def bicycle_bell(place, rng):
    out, pitch = np.zeros(N), between(1700, 2200, place)
    for start in (0.04, rng.uniform(0.9, 1.1)):
        for i in range(8):
            bell = ringing([pitch, 1.52 * pitch, 2.24 * pitch, 2.97 * pitch], 0.22, 1.0)
            put(out, start + i / between(20, 27, place), (0.5 + 0.5 * (i % 2)) * bell)
    return out


def robot(place, rng):
    out, at = np.zeros(N), 0.02
    while at < 1.9:
        length = int(rng.uniform(0.06, 0.2) / between(0.85, 1.2, place) * RATE)
        first, last = rng.uniform(500, 2600, 2)
        if rng.random() < 0.5:
            last = first
        beep = np.sin(2 * np.pi * np.cumsum(np.linspace(first, last, length)) / RATE)
        put(out, at, beep * np.minimum(1, np.hanning(length) * 6))
        at += length / RATE + rng.uniform(0.01, 0.05)
    return out


MAKERS = (
    siren, ambulance, heartbeat, alarm_clock, ticking_clock, rain, thunder, wind, fire,
    car_horn, ship_horn, steam_train, water_drop, owl, cricket, frog, bee, wolf, rattlesnake,
    camera, knock_on_a_door, ping_pong_ball, basketball, hammer, rocket, fireworks,
    flying_saucer, motorcycle, radio_static, video_game, cow, cat, sheep, duck, whale, chick,
    bicycle_bell, robot, hand_saw,
)  # fmt: skip
SYNTHESISED = {make.__name__.replace("_", " "): make for make in MAKERS}
