"""Soundscapes of mini's world: one or two sounds, in order or together, loud or soft, high or low.

Takes are two seconds at 16 kHz. What is composed has the same length.

Dimensions: S = SAMPLES samples.
"""

from __future__ import annotations

import functools
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from mmllm.mini.world.scenes import is_heldout
from mmllm.mini.world.things import DATA

RATE, SAMPLES = 16_000, 32_768

Layout = Literal["alone", "then", "together"]
Loudness = Literal["loud", "soft"]
Pitch = Literal["high", "low"]

_GAINS = {"loud": 1.0, None: 0.55, "soft": 0.12}
_SPEEDS = {"high": 1.6, None: 1.0, "low": 0.62}
_FADE = 400  # samples


@dataclass(frozen=True)
class Voice:
    """One sound."""

    sound: str
    """An id of sounds.json."""
    loudness: Loudness | None = None
    pitch: Pitch | None = None
    times: int = 1
    """How often it comes, 1 to 3."""


@dataclass(frozen=True)
class Soundscape:
    """What sounds: one voice alone, one after another, or two at once."""

    voices: tuple[Voice, ...]
    layout: Layout = "alone"


@dataclass(frozen=True)
class Sound:
    """One sound of the vocabulary."""

    id: str
    label: str
    thing: str
    """The label as a noun phrase: "a piano", "rain"."""
    takes: tuple[str, ...]
    """Files of training, in the folder of the data."""
    heldout_takes: tuple[str, ...]


@functools.cache
def sounds() -> dict[str, Sound]:
    """The vocabulary by id."""
    with gzip.open(DATA / "sounds.json.gz", "rt", encoding="utf-8") as file:
        tree = json.load(file)
    takes: dict[str, tuple[list[str], list[str]]] = {}
    for item in tree["items"]:
        split = takes.setdefault(item["concept"], ([], []))
        split[item["split"] != "train"].append(item["file"])
    return {
        row["id"]: Sound(
            row["id"], row["label"], row["thing"], *(tuple(part) for part in takes[row["id"]])
        )
        for row in tree["concepts"]
    }


def combination(scape: Soundscape) -> tuple[str, ...] | None:
    """The pair of sounds that is combined, in no order, or None."""
    if len(scape.voices) < 2:
        return None
    return ("sounds", *sorted(voice.sound for voice in scape.voices))


def is_training(scape: Soundscape) -> bool:
    """Whether training may have a soundscape: one in ten pairs is held out."""
    pair = combination(scape)
    return pair is None or not is_heldout(pair)


def draw_soundscape(rng: random.Random) -> Soundscape:
    """A soundscape, held out or not."""
    ids = list(sounds())
    if rng.random() < 0.5:
        kind = rng.choice(("plain", "loudness", "pitch", "times"))
        voice = Voice(
            rng.choice(ids),
            rng.choice(("loud", "soft")) if kind == "loudness" else None,
            rng.choice(("high", "low")) if kind == "pitch" else None,
            rng.choice((2, 3)) if kind == "times" else 1,
        )
        return Soundscape((voice,))
    one, other = rng.sample(ids, 2)
    return Soundscape((Voice(one), Voice(other)), rng.choice(("then", "together")))


def draw_training_soundscape(rng: random.Random) -> Soundscape:
    """A soundscape without a held-out pair."""
    while True:
        scape = draw_soundscape(rng)
        if is_training(scape):
            return scape


def draw_heldout_soundscape(rng: random.Random) -> Soundscape:
    """A soundscape of a held-out pair."""
    while True:
        scape = draw_soundscape(rng)
        if not is_training(scape):
            return scape


def render_soundscape(
    scape: Soundscape, rng: random.Random, heldout_takes: bool = False
) -> NDArray[np.float32]:
    """The waveform of a soundscape, float32[S] in -1..1.

    Args:
        scape: What sounds.
        rng: Chooses the takes.
        heldout_takes: Whether takes that training never has are chosen.
    """
    parts = len(scape.voices) if scape.layout == "then" else 1
    length = SAMPLES // parts
    waves = []
    for voice in scape.voices:
        sound = sounds()[voice.sound]
        take = rng.choice(sound.heldout_takes if heldout_takes else sound.takes)
        waves.append(_voice(voice, _read(take), length))
    if scape.layout == "then":
        return np.concatenate([*waves, np.zeros(SAMPLES - parts * length, np.float32)])
    mixed = np.sum(waves, axis=0)
    return (mixed / max(1.0, float(np.abs(mixed).max()))).astype(np.float32)


@functools.lru_cache(maxsize=1000)
def _read(file: str) -> NDArray[np.float32]:
    wave, rate = soundfile.read(DATA / file, dtype="float32")
    if rate != RATE:
        raise ValueError(f"{file} is sampled at {rate} Hz; {RATE} expected")
    return (wave / max(1e-3, float(np.abs(wave).max()))).astype(np.float32)


def _voice(voice: Voice, wave: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """A take at its pitch and loudness, so often, cut or filled to `length` samples."""
    speed = _SPEEDS[voice.pitch]
    if speed != 1:
        places = np.arange(0, len(wave) - 1, speed)
        wave = np.interp(places, np.arange(len(wave)), wave).astype(np.float32)
    each = length // voice.times
    part = np.zeros(each, np.float32)
    taken = min(each - _FADE if voice.times > 1 else each, len(wave))
    part[:taken] = wave[:taken]
    fade = np.linspace(1, 0, _FADE, dtype=np.float32)
    if taken < len(wave):
        part[taken - _FADE : taken] *= fade
    whole = np.concatenate([np.tile(part, voice.times), np.zeros(length - each * voice.times)])
    return (_GAINS[voice.loudness] * whole).astype(np.float32)


_ORDERS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "then": (
        ("{a} and then {b}", "{a}, then {b}", "first {a}, then {b}", "{b} after {a}"),
        ("{a} followed by {b}", "{b}, but {a} before it"),
    ),
    "together": (
        (
            "{a} and {b} together",
            "{a} and {b} at the same time",
            "{a} with {b}",
            "{a} while {b} sounds",
        ),
        ("{a} along with {b}", "{a} and {b} at once"),
    ),
}
_TIMES = {2: ("twice", "two times"), 3: ("three times", "3 times")}


def describe_soundscape(scape: Soundscape) -> str:
    """The canonical caption: "a cat and then a soft bell"."""
    return soundscape_caption(scape, random.Random(0), "canonical")


def announce_soundscape(scape: Soundscape) -> str:
    """What a reply says before sounds: "Here is the sound of a dog and then a bell."."""
    return f"Here is the sound of {describe_soundscape(scape)}."


def soundscape_caption(
    scape: Soundscape,
    rng: random.Random,
    wording: Literal["canonical", "training", "heldout"] = "training",
) -> str:
    """A caption of a soundscape; the arguments are those of `captions.caption`."""
    names = [_phrase(voice, rng, wording) for voice in scape.voices]
    if scape.layout == "alone":
        return names[0]
    options = _ORDERS[scape.layout][wording == "heldout"]
    text = options[0] if wording == "canonical" else rng.choice(options)
    return text.format(a=names[0], b=names[1])


def _phrase(voice: Voice, rng: random.Random, wording: str) -> str:
    thing = sounds()[voice.sound].thing
    adjectives = [word for word in (voice.loudness, voice.pitch) if word]
    if wording != "canonical" and voice.loudness == "soft" and rng.random() < 0.5:
        adjectives[0] = "quiet"
    for word in reversed(adjectives):
        article, _, rest = thing.partition(" ")
        thing = f"a {word} {rest}" if article in ("a", "an") else f"{word} {thing}"
    if voice.times > 1:
        times = _TIMES[voice.times]
        thing += f" {times[0] if wording == 'canonical' else rng.choice(times)}"
    return thing
