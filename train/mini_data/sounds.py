"""Makes the sounds of `mini`: concepts with eight takes each, as Opus files and `sounds.json.gz`.

    apt-get install fluidsynth fluid-soundfont-gm sonic-pi-samples      # Debian 12
    python train/mini_data/sounds.py --out mmllm/mini/data              # about one minute

Most concepts are General MIDI instruments *rendered* by the `fluidsynth` program, some are
*synthesised* below, one is cut from *recorded* hits. Takes 0-5 train; takes 6 and 7 are held out:
their pitches, tempi and velocities lie between the trained ones, and no trained take has them.
The samples are the same on every run (an unchanged file is left alone: Ogg stamps a random serial).

Shapes: N = 32,768 samples at 16 kHz (2.048 s), mono, peak -1 dBFS.
"""

import argparse
import json
import logging
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from mmllm.data.sources import write_text

log = logging.getLogger("sounds")

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

CAPTIONS = {
    "train": [
        "{caption}",
        "{label}",
        "a recording of {thing}",
        "an audio clip of {thing}",
        "what {thing} sounds like",
        "the noise of {thing}",
        "audio of {thing}",
        "listen to {thing}",
        "a short sound: {label}",
        "the typical sound of {thing}",
    ],
    "heldout": [
        "a sound clip of {thing}",
        "how {thing} sounds",
        "sound effect: {label}",
        "hear {thing}",
        "a sample of {caption}",
    ],
}


# ---------------------------------------------------------------- where a sound comes from
@dataclass(frozen=True)
class Rendered:
    """A preset of the soundfont playing short phrases.

    A phrase is a list of steps; a step is `pitch+pitch…*beats` in semitones above the base pitch
    (on the drum channel: keys of the kit), or `.` for a rest. Takes go through `phrases` in turn.
    """

    program: int
    low: int  # base pitches of the takes lie between low and high
    high: int
    phrases: tuple[str, ...]
    beat: float = 0.25  # seconds
    bank: int = 0
    ring: bool = False  # let every note sound to the end of the take
    strum: float = 0.0  # seconds between the notes of a chord
    skip: float = 0.0  # start this many seconds into the sound
    swell: bool = False  # rise and fall once, as a breaker does
    kit: bool = False
    kits: tuple[int, ...] = (0, 8, 16)  # drum presets that the takes go through
    kind = "rendered"

    def note(self, take: int) -> str:
        base = f"kit {self.preset(take)}" if self.kit else f"pitch {self.base(take)}"
        phrase = " ".join(self.phrase(take))
        return f"{base}, velocity {VELOCITY[take]}, tempo {TEMPO[take]}, phrase '{phrase}'"

    def base(self, take: int) -> int:
        return 0 if self.kit else round(self.low + PLACE[take] * (self.high - self.low))

    def phrase(self, take: int) -> list[str]:
        """The steps of a take; the last one plays its phrase backwards: another figure."""
        steps = self.phrases[take % len(self.phrases)].split()
        return steps[::-1] if take == len(PLACE) - 1 else steps

    def preset(self, take: int) -> int:
        return self.kits[take % len(self.kits)] if self.kit else self.program

    def notes(self, take: int) -> list[tuple[float, float, int]]:
        """(start, end, key) of every note of the take, in seconds."""
        beat, start, notes = self.beat / TEMPO[take], START[take], []
        for step in self.phrase(take):
            chord, _, beats = step.partition("*")
            length = beat * float(beats or 1)
            if chord != ".":
                for i, pitch in enumerate(chord.split("+")):
                    begin = start + i * self.strum
                    end = SLOT - 1 if self.ring else begin + 0.95 * length
                    notes.append((begin, end, self.base(take) + int(pitch)))
            start += length
        return notes


@dataclass(frozen=True)
class Synthesised:
    """`make(place, rng) -> float[<= N]`; place in [0, 1] moves pitch or rate from take to take."""

    make: Callable[[float, np.random.Generator], np.ndarray]
    kind = "synthesised"

    def note(self, take: int) -> str:
        return f"{self.make.__name__}, place {PLACE[take]}"


@dataclass(frozen=True)
class Recorded:
    """Patterns of recorded hits; no hit file is shared between trained and held-out takes."""

    hits: tuple[tuple[str, ...], ...]  # per take: file stems, played one after the other
    beat: float
    kind = "recorded"

    def note(self, take: int) -> str:
        return "hits " + " ".join(self.hits[take])


@dataclass(frozen=True)
class Concept:
    label: str
    source: Rendered | Synthesised | Recorded
    picture: str | None  # id of the picture concept that means the same
    synonyms: tuple[str, ...]
    heldout_synonyms: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.label.replace(" ", "-")

    @property
    def thing(self) -> str:
        """The label with its article: "a violin", "an owl", "rain"."""
        if self.label in NO_ARTICLE:
            return self.label
        return f"{'an' if self.label[0] in 'aeiou' else 'a'} {self.label}"


# ---------------------------------------------------------------- rendering
def midi(source: Rendered) -> bytes:
    """All takes of a source as one MIDI file, a take every SLOT seconds; one tick is 1 ms."""
    channel, events = (9 if source.kit else 0), []
    for take in range(len(PLACE)):
        at = round(1000 * SLOT * take)
        bend = 8192 + round(8192 * CENTS[take] / 200) if source.kit else 8192
        events += [
            (at, 0, bytes([0xB0 | channel, 120, 0])),
            (at, 1, bytes([0xB0 | channel, 0, source.bank])),
            (at, 2, bytes([0xC0 | channel, source.preset(take)])),
            (at, 3, bytes([0xE0 | channel, bend & 127, bend >> 7])),
        ]
        for i, (start, end, key) in enumerate(source.notes(take)):
            velocity = max(1, VELOCITY[take] - 6 * (i % 2))
            on, off = 20 + round(1000 * start), 20 + round(1000 * end)
            events.append((at + on, 5, bytes([0x90 | channel, key, velocity])))
            events.append((at + off, 4, bytes([0x80 | channel, key, 0])))
    events.append((round(1000 * SLOT * len(PLACE)), 0, b"\xff\x2f\x00"))
    events.sort(key=lambda event: event[:2])
    track, now = b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big"), 0
    for at, _, message in events:
        track += variable_length(at - now) + message
        now = at
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 1000)
    return header + b"MTrk" + struct.pack(">I", len(track)) + track


def variable_length(value: int) -> bytes:
    digits = [value & 127]
    while value := value >> 7:
        digits.append(128 | value & 127)
    return bytes(reversed(digits))


def render(source: Rendered, font: Path) -> list[np.ndarray]:
    """float[N] per take. fluidsynth on one core, without reverb and chorus."""
    with tempfile.TemporaryDirectory() as folder:
        song, wave = Path(folder, "song.mid"), Path(folder, "song.wav")
        song.write_bytes(midi(source))
        options = [
            "synth.dynamic-sample-loading=1",
            "synth.cpu-cores=1",
            "synth.gain=0.5",
        ]
        command = [
            "fluidsynth",
            "-ni",
            "-q",
            "-R",
            "0",
            "-C",
            "0",
            "-r",
            str(RENDER_RATE),
        ]
        command += [part for option in options for part in ("-o", option)]
        command += ["-T", "wav", "-O", "float", "-F", str(wave), str(font), str(song)]
        subprocess.run(command, check=True, capture_output=True)
        samples, _ = soundfile.read(wave, dtype="float32")
    mono = resample_poly(samples.mean(axis=1), 1, RENDER_RATE // RATE)
    starts = [round((SLOT * take + 0.02 + source.skip) * RATE) for take in range(len(PLACE))]
    takes = [mono[start : start + N] for start in starts]
    if source.swell:
        takes = [x * (0.1 + hump(0.7 + 0.7 * PLACE[i], 2.2)) for i, x in enumerate(takes)]
    return takes


def recorded(source: Recorded, samples: Path) -> list[np.ndarray]:
    takes = []
    for take, stems in enumerate(source.hits):
        out = np.zeros(N)
        for i, stem in enumerate(stems):
            hit, rate = soundfile.read(samples / f"tabla_{stem}.flac", always_2d=True)
            at = START[take] + i * source.beat / TEMPO[take]
            put(out, at, resample_poly(hit.mean(axis=1), RATE, rate))
        takes.append(out)
    return takes


def finish(samples: np.ndarray, name: str) -> np.ndarray:
    """float[<= N] -> float[N], faded at the end, peak at -1 dBFS. Refuses silence."""
    samples = np.pad(samples[:N], (0, max(0, N - len(samples))))
    samples = samples - samples.mean()
    samples[-FADE:] *= np.cos(np.linspace(0, np.pi / 2, FADE)) ** 2
    peak = np.abs(samples).max()
    if peak < 1e-3:
        raise ValueError(f"{name}: silent (peak {peak:.1e}); does the soundfont have its preset?")
    samples = samples * (PEAK / peak)
    if np.sqrt(np.mean(samples**2)) < 0.01:
        raise ValueError(f"{name}: almost silent after its peak; make the phrase fuller")
    return samples


# ---------------------------------------------------------------- synthesis: the tools
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


# ---------------------------------------------------------------- synthesis: the sounds
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


def cow(place, rng):
    pitch = between(105, 150, place) * np.interp(TIME, [0, 0.4, 1.4, 2.05], [0.8, 1, 1.05, 0.75])
    opening = np.interp(TIME, [0, 0.5, 1.5, 2.0], [0, 1, 1, 0.3])
    growl = 1 + 0.25 * noise(rng, 15, 50)
    moo = voice(pitch, [(280 + 280 * opening, 90), (700 + 350 * opening, 140), (2300, 400)])
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


# ---------------------------------------------------------------- the concepts
HELD = ("0*6", "0*3 2*3", "0*2 4*2 7*3")
CHORD = ("0+4+7+12*7", "0+4+7*3 0+5+9*4", "0+3+7+12*7")
STRUM = (
    "0+7+12+16+19*3 0+7+12+16+19 0+7+12+16+19*3",
    "0+7+12+15+19*2 0+7+12+15+19 0+7+12+15+19*4",
)


def gm(program: int, low: int, high: int, phrases: tuple[str, ...], **more) -> Rendered:
    return Rendered(program, low, high, phrases, **more)


def kit(*phrases: str, **more) -> Rendered:
    return Rendered(0, 0, 0, phrases, kit=True, **more)


def rolls(steps: str, times: int) -> str:
    """Every step repeated: rolls("0 7", 2) is "0 0 7 7"."""
    return " ".join(step for step in steps.split() for _ in range(times))


HITS = (
    ("ghe1", "na", "te1", "na"),
    ("ghe2", "tas1", "ke3", "tas1"),
    ("ghe3", "te2", "na", "te2"),
    ("tun1", "ghe4", "te1", "tun1"),
    ("ghe5", "re", "na_s", "dhec"),
    ("ghe6", "tas2", "ghe1", "tas2"),
    ("ghe7", "na_o", "te_m", "na_o"),
    ("ghe8", "tun3", "te_ne", "tas3"),
)

RENDERED: dict[str, Rendered] = {
    # keyboards and mallets
    "piano": gm(0, 48, 68, CHORD),
    "music box": gm(10, 72, 87, ("12 7 9 4 7 0 4*2", "0 4 7 12 7 4 12*2"), ring=True),
    "marimba": gm(12, 48, 63, (rolls("0 7 4 0", 4), rolls("0+7 4+9 0+7 4+9", 4)), beat=0.12),
    "xylophone": gm(
        13, 72, 87, ("0 2 4 5 7 9 11 12", "12 11 9 7 5 4 2 0", "0 4 2 5 4 7 5 12"), beat=0.2
    ),
    "church bell": gm(14, 50, 65, ("0*8", "0*4 0*4", "5*4 0*4"), ring=True),
    "church organ": gm(19, 43, 58, CHORD, beat=0.28),
    "accordion": gm(21, 55, 70, ("0 4+7 4+7 0 4+7 4+7 0 4+7", "-5 4+7 4+7 0 4+7 4+7 -5 4+7")),
    "harmonica": gm(22, 62, 77, ("0+4*3 2+5 4+7*4", "4+7 2+5 0+4*5")),
    # strings
    "guitar": gm(25, 40, 52, STRUM, ring=True, strum=0.018),
    "electric guitar": gm(
        30, 40, 50, ("0+7+12*3 0+7+12 3+10+15*4", "0+7+12 0+7+12 5+12+17*2 3+10+15*4")
    ),
    "banjo": gm(105, 55, 67, ("0 12 7 4 12 0 7 12 " * 2, "12 7 4 12 0 4 12 7 " * 2), beat=0.125),
    "violin": gm(40, 64, 82, HELD, beat=0.3),
    "cello": gm(42, 38, 53, HELD, beat=0.3),
    "harp": gm(
        46,
        48,
        62,
        ("0 4 7 12 16 19 24 28 31 28 24 19 16 12", "31 28 24 19 16 12 7 4 0 4 7 12 16 19"),
        beat=0.1,
        ring=True,
    ),
    "sitar": gm(104, 48, 60, ("0*2 1 4*2 5 7*3", "7*2 5 4 1 0*4"), ring=True),
    "choir": gm(52, 50, 64, ("0+4+7+12*8", "0+4+7*4 0+5+9*4"), beat=0.28, skip=0.15),
    # brass and woodwind
    "trumpet": gm(56, 60, 74, ("0 0 0 4*2 7*6", "7 4 0 4 7*6", "0 4 7 12*7"), beat=0.18),
    "tuba": gm(58, 28, 40, ("0*2 7*2 0*2 7*2", "0*2 5*2 7*2 0*2")),
    "saxophone": gm(65, 55, 69, ("0 3 5 6 7 10*3", "10 7 6 5 3 0*3", "0*2 3 5*4")),
    "clarinet": gm(71, 50, 66, ("0 4 7 12 7 4 0*2", "12 7 4 0 4 7 12*2"), beat=0.22),
    "flute": gm(73, 72, 88, ("0 2 4 5 7*3", "7 5 4 2 0*3", "0*2 4 2 0*3"), beat=0.26),
    "bagpipes": gm(109, 60, 67, ("0*8", "0*2 2*2 4*4", "4*2 2*2 0*4")),
    # percussion
    "steel drum": gm(114, 60, 74, ("0 4 7 4 9 7 4*2", "7 9 7 4 0 4 7*2"), beat=0.22),
    "timpani": gm(47, 40, 52, (rolls("0", 15) + " 0*8", "0*6 7*2 7*2 0*8"), beat=0.09),
    "snare drum": kit(
        rolls("38", 15) + " 38*4 38*4",
        "38*4 38*2 38*2 38*4 38 38 38 38 38*4",
        rolls("40", 10) + " 40*4 40*4",
        beat=0.085,
    ),
    "bass drum": kit("36*2 36*2 36*2 36*2", "36*2 36 36 36*2 36*2", "35*4 35*4"),
    "cymbal": kit("49*8", "57*8", "49*4 49*4", ring=True),
    "tambourine": kit(rolls("54", 8), "54*2 54 54 54*2 54 54"),
    "cowbell": kit("56*2 56 56 56*2 56*2", "56 56 56*2 56 56 56*2"),
    "bongos": kit("60 60 61 60 60 61 60 " * 2, "60 61 61 60 61 61 60 " * 2, beat=0.14),
    "maracas": kit(rolls("70", 16), "70*2 70 70 " * 4, beat=0.125),
    "triangle": kit("81*8", "81*4 81*4", "80 80 81*6", ring=True),
    "drum kit": kit(
        "36+42 42 38+42 42 36+42 36+42 38+42 42", "36+42 42 38+42 36+42 42 36+42 38+42 46"
    ),
    "referee whistle": kit("72*3 72*3", "71 71 72*5", "72*7", beat=0.26),
    # General MIDI effects
    "bird": gm(123, 60, 80, ("0*2 . 2*2 . 0*2", "0*2 .*2 3*2 0*2", "2*2 0*2 . 2*2")),
    "telephone": gm(124, 55, 70, ("0*5 . 0*2", "0*4 .*2 0*2"), beat=0.26),
    "helicopter": gm(125, 55, 70, ("0*20",), skip=0.5),
    "applause": gm(126, 52, 68, ("0*20",), skip=0.6),
    "gunshot": gm(127, 50, 66, ("0*8", "0*4 0*4"), ring=True),
    "ocean wave": gm(122, 52, 68, ("0*24",), skip=1.2, swell=True),
}

RECORDED = {"tabla": Recorded(HITS, beat=0.45)}

MAKERS = (
    siren, ambulance, heartbeat, alarm_clock, ticking_clock, rain, thunder, wind, fire,
    car_horn, ship_horn, steam_train, water_drop, owl, cricket, frog, bee, wolf, rattlesnake,
    camera, knock_on_a_door, ping_pong_ball, basketball, hammer, rocket, fireworks,
    flying_saucer, motorcycle, radio_static, video_game, cow, cat, sheep, duck, whale, chick,
    bicycle_bell, robot, hand_saw,
)  # fmt: skip
SYNTHESISED = {make.__name__.replace("_", " "): make for make in MAKERS}

# label | id of the picture of the same thing | synonyms | synonyms kept for tests
# Labels take "a" or "an" but for those in NO_ARTICLE.
NAMES = """
piano           | piano           | grand piano                    | pianoforte
music box       |                 |                                |
marimba         |                 |                                |
xylophone       |                 |                                |
church bell     | bell            | bell, tubular bells            |
church organ    |                 | pipe organ, organ              |
accordion       | accordion       | squeezebox                     | concertina
harmonica       |                 | mouth organ                    | blues harp
guitar          | guitar          | acoustic guitar                | six-string
electric guitar |                 | distorted guitar               |
banjo           | banjo           |                                |
violin          | violin          | fiddle                         |
cello           |                 | violoncello                    |
harp            |                 |                                |
sitar           |                 |                                |
choir           |                 | chorus                         |
trumpet         | trumpet         |                                |
tuba            |                 |                                |
saxophone       | saxophone       | sax                            |
clarinet        |                 |                                |
flute           | flute           |                                |
bagpipes        |                 | bagpipe                        |
steel drum      |                 | steelpan                       |
timpani         |                 | kettledrum                     |
snare drum      | drum            | drum, snare                    | side drum
bass drum       |                 | kick drum                      |
cymbal          |                 | crash cymbal                   |
tambourine      |                 |                                |
cowbell         |                 |                                |
bongos          |                 | bongo drums, bongo             |
maracas         | maracas         | maraca                         | rumba shakers
triangle        |                 |                                |
drum kit        |                 | drum set                       | rock drums
referee whistle |                 | whistle                        | pea whistle
bird            | bird            | songbird                       | birdsong
telephone       | telephone       | phone                          | landline
helicopter      | helicopter      | chopper                        | rotorcraft
applause        | clapping-hands  | clapping                       | ovation
gunshot         |                 | gun                            |
ocean wave      | wave            | wave, surf                     | breakers
tabla           |                 |                                |
siren           | siren           | police siren                   |
ambulance       | ambulance       |                                |
heartbeat       |                 | beating heart                  | pulse
alarm clock     | alarm-clock     | alarm                          |
ticking clock   |                 | tick-tock                      |
rain            | rain-cloud      | rainfall                       | rain shower
thunder         | thundercloud    | thunderclap                    | thunderstorm
wind            |                 | howling wind                   | gale
fire            | fire            | campfire                       | crackling flames
car horn        | car             | car                            | honking
ship horn       | ship            | ship, foghorn                  |
steam train     | steam-locomotive | steam locomotive, locomotive  | steam engine
water drop      | water-drop      | droplet                        | dripping water
owl             | owl             |                                | hooting
cricket         |                 |                                |
frog            | frog            |                                | croaking
bee             | bee             | honeybee                       | bumblebee
wolf            | wolf            |                                |
rattlesnake     | snake           | snake                          |
camera          | camera          | camera shutter                 |
knock on a door | door            | knocking, door                 |
ping pong ball  |                 | table tennis ball, ping pong   |
basketball      | basketball      |                                | bouncing ball
hammer          | hammer          | hammering                      |
hand saw        | saw             | saw, handsaw                   | sawing
rocket          | rocket          | rocket launch                  |
fireworks       | fireworks       | firework                       |
flying saucer   | flying-saucer   | ufo                            |
motorcycle      | motorcycle      | motorbike                      |
radio static    | radio           | radio                          |
video game      | game-controller | game controller, chiptune      |
cow             | cow             |                                | mooing
cat             | cat             |                                | meow
sheep           | sheep           |                                | bleating
duck            | duck            |                                | quacking
whale           | whale           |                                | whale song
chick           | chick           | baby chick                     |
bicycle bell    | bicycle         | bicycle, bike bell             |
robot           | robot           |                                | android
"""
NO_ARTICLE = {"bagpipes", "timpani", "bongos", "maracas", "applause", "rain", "thunder", "wind"}
NO_ARTICLE |= {"radio static", "fireworks"}


def concepts() -> list[Concept]:
    """The rows of NAMES, each with the source of its sound."""
    sources = RENDERED | RECORDED | {k: Synthesised(make) for k, make in SYNTHESISED.items()}
    rows = [[cell.strip() for cell in row.split("|")] for row in NAMES.strip().splitlines()]
    if {row[0] for row in rows} != sources.keys():
        raise ValueError(f"names without sound or reverse: {sources.keys() ^ {r[0] for r in rows}}")
    return [
        Concept(label, sources[label], picture or None, names(synonyms), names(heldout))
        for label, picture, synonyms, heldout in rows
    ]


def names(cell: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in cell.split(",") if name.strip())


# ---------------------------------------------------------------- checks and files
def check_names(found: list[Concept]) -> None:
    """Every label or synonym names one concept: the longest whole-word match decides."""
    owner: dict[str, str] = {}
    for concept in found:
        for name in (concept.label, *concept.synonyms, *concept.heldout_synonyms):
            if owner.setdefault(name.lower(), concept.id) != concept.id:
                raise ValueError(f"'{name}' names both {owner[name.lower()]} and {concept.id}")
    for name, concept_id in owner.items():
        if named_concept(name, owner) != {concept_id}:
            raise ValueError(f"'{name}' is read as {named_concept(name, owner)}, not {concept_id}")


def named_concept(text: str, owner: dict[str, str]) -> set[str]:
    """Ids named in `text`, longest names first; a name inside a longer one does not count."""
    text, found = text.lower(), set()
    for name in sorted(owner, key=len, reverse=True):
        pattern = rf"(?<![\w-]){re.escape(name)}(?![\w-])"
        if re.search(pattern, text):
            found.add(owner[name])
            text = re.sub(pattern, "|", text)
    return found


def takes(concept: Concept, font: Path, samples: Path) -> list[np.ndarray]:
    match concept.source:
        case Rendered() as source:
            raw = render(source, font)
        case Recorded() as source:
            raw = recorded(source, samples)
        case Synthesised(make):
            seeds = [zlib.crc32(f"{concept.id}/{take}".encode()) for take in range(len(PLACE))]
            raw = [make(PLACE[i], np.random.default_rng(seed)) for i, seed in enumerate(seeds)]
    return [finish(x.astype(np.float64), f"{concept.id}/{i}") for i, x in enumerate(raw)]


def save(samples: np.ndarray, path: Path) -> None:
    """float[N] -> Ogg Opus, about 16 kbit/s, whose *decoded* peak is close to -1 dBFS.

    Opus overshoots on clicks, so a pass measures the peak and the next one is scaled by it.
    A file that already sounds the same is left alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    for _ in range(8):
        soundfile.write(fresh, samples, RATE, format="OGG", subtype="OPUS", compression_level=0.97)
        decoded, _ = soundfile.read(fresh)
        if abs(np.abs(decoded).max() - PEAK) < 0.08:
            break
        samples = samples * (PEAK / np.abs(decoded).max()) ** 0.8
    if decoded.shape != (N,) or np.abs(decoded).max() > 1:
        raise ValueError(f"{path}: decodes to {decoded.shape}, peak {np.abs(decoded).max():.2f}")
    if path.exists() and np.array_equal(decoded, soundfile.read(path)[0]):
        fresh.unlink()
    else:
        fresh.replace(path)


def table(found: list[Concept]) -> dict:
    return {
        "concepts": [
            {
                "id": c.id,
                "label": c.label,
                "thing": c.thing,
                "caption": f"the sound of {c.thing}",
                "synonyms": list(c.synonyms),
                "heldout_synonyms": list(c.heldout_synonyms),
                "picture": c.picture,
                "kind": c.source.kind,
            }
            for c in found
        ],
        "items": [
            {
                "file": f"sounds/{c.id}/{take}.ogg",
                "modality": "audio",
                "concept": c.id,
                "take": take,
                "split": split,
                "note": c.source.note(take),
            }
            for c in found
            for take, split in enumerate(SPLITS)
        ],
        "captions": CAPTIONS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mmllm/mini/data"))
    parser.add_argument(
        "--soundfont", type=Path, default=Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
    )
    parser.add_argument("--samples", type=Path, default=Path("/usr/share/sonic-pi/samples"))
    parser.add_argument("--only", nargs="*", help="remake the files of these concepts only")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for path in (args.soundfont, args.samples):
        if not path.exists():
            raise SystemExit(f"{path} is missing; see the packages at the top of this file")
    found = concepts()
    check_names(found)
    for concept in found:
        if args.only is not None and concept.id not in args.only:
            continue
        for take, samples in enumerate(takes(concept, args.soundfont, args.samples)):
            save(samples, args.out / "sounds" / concept.id / f"{take}.ogg")
        log.info("%s (%s)", concept.id, concept.source.kind)
    write_text(args.out / "sounds.json.gz", json.dumps(table(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
