"""Renders presets of a soundfont and patterns of recorded hits."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from tools.mini.data.sounds.sources import Recorded, Rendered
from tools.mini.data.sounds.synthesis import hump, put
from tools.mini.data.sounds.takes import (
    CENTS,
    FADE,
    PEAK,
    PLACE,
    RATE,
    RENDER_RATE,
    SLOT,
    START,
    TEMPO,
    VELOCITY,
    N,
)


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
