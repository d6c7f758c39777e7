"""The three sources of sounds: a soundfont, synthesis and recorded hits; and a concept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tools.mini.data.sounds.takes import PLACE, SLOT, START, TEMPO, VELOCITY


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


NO_ARTICLE = {"bagpipes", "timpani", "bongos", "maracas", "applause", "rain", "thunder", "wind"}


NO_ARTICLE |= {"radio static", "fireworks"}
