"""Progress bars: one line on a terminal, and nothing where stderr is a file.

A bar that is opened while another is shown takes its line until it is closed. Where the variable
MMLLM_PART of the environment names a part of `make demo` ("2/5"), bars name it too, and say about
how long all parts will still take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

PART = "MMLLM_PART"
"""Environment variable: "2/5" is the second of the five parts of `make demo`."""

PARTS: tuple[tuple[str, dict[str, float]], ...] = (
    (
        "stage 1 of 3",
        {
            "frozen parts": 27,
            **dict.fromkeys(
                (f"pre-alignment: input_projections.{key}" for key in ("image", "audio", "video")),
                7,
            ),
            "encoder_alignment": 95,
        },
    ),
    (
        "stage 2 of 3",
        {
            "frozen parts": 3,
            "pre-alignment: hidden states": 53,
            **dict.fromkeys(
                (f"pre-alignment: output_projections.{key}" for key in ("image", "audio", "video")),
                27,
            ),
            "decoder_alignment": 81,
        },
    ),
    (
        "stage 3 of 3",
        {
            "frozen parts": 1,
            "instruction_tuning": 349,
            "pre-alignment: hidden states": 75,
            **dict.fromkeys(
                (f"pre-alignment: output_projections.{key}" for key in ("image", "audio", "video")),
                26,
            ),
        },
    ),
    ("evaluation", {"evaluation": 237}),
    ("gallery", {"gallery": 20}),  # it shows no bar
)
"""Name, and bars with their seconds on two idle cores, of each part of `make demo`."""

_FORMAT = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}{left}{postfix}]"

_shown: list[_Bar] = []
"""The bars that are open; the last one has the line."""
_speed = 1.0
"""Seconds that this process takes for what takes a second by PARTS."""


@contextmanager
def progress_bar(
    name: str, *, total: int, unit: str, show: bool = True, initial: int = 0
) -> Iterator[tqdm]:
    """Show a bar for the block, whose `update` counts.

    Args:
        name: what is done; a key of PARTS gives an estimate of all that is left.
        total: number of units.
        unit: singular, "step".
        show: False shows none.
        initial: units that were done before.
    """
    hidden = _shown[-1] if _shown and not _shown[-1].disable else None
    if hidden is not None:
        hidden.clear()
        hidden.disable = True
    bar = _Bar(
        name,
        total=total,
        unit=unit,
        initial=initial,
        disable=None if show else True,  # None: shown on terminals only
        leave=False,
        position=0,
        bar_format=_FORMAT,
        dynamic_ncols=True,
    )
    _shown.append(bar)
    try:
        yield bar
    finally:
        _shown.remove(bar)
        bar.close()
        if hidden is not None:
            hidden.disable = False


class _Bar(tqdm):
    """tqdm with the part of `make demo` in its description."""

    def __init__(self, name: str, **options: Any):
        self.name = name
        part = _part()
        self._prefix = f"[{os.environ[PART]}] {PARTS[part][0]}, " if part is not None else ""
        super().__init__(desc=self._prefix + name, **options)

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        super().set_description(self._prefix + (desc or self.name), refresh)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the format is filled with; `left` is the time left, of all parts if it is known."""
        facts = super().format_dict
        total, done = facts["total"] or 1, facts["n"] / (facts["total"] or 1)
        here = facts["n"] - facts["initial"]
        left = facts["elapsed"] / here * (total - facts["n"]) if here > 0 else None
        overall = _seconds_left(self.name, done, facts["elapsed"], here / total)
        if overall is not None:
            text = f", about {max(round(overall / 60), 1)} min left in all"
        else:
            text = "" if left is None else f"<{tqdm.format_interval(left)}"
        return {**facts, "left": text}


def _part() -> int | None:
    """Index of the part of `make demo` that this process is."""
    number, _, count = os.environ.get(PART, "").partition("/")
    known = number.isdigit() and count == str(len(PARTS)) and 1 <= int(number) <= len(PARTS)
    return int(number) - 1 if known else None


def _seconds_left(name: str, done: float, elapsed: float, here: float) -> float | None:
    """Seconds until the end of `make demo`; None in another command, or if the bar is unknown.

    Args:
        name: of the bar.
        done: fraction of the bar.
        elapsed: seconds that this process needed for the fraction `here` of the bar.
        here: that fraction.
    """
    global _speed
    part = _part()
    if part is None or name not in PARTS[part][1]:
        return None
    bars = PARTS[part][1]
    if here > 0.05:
        _speed = elapsed / (here * bars[name])
    names = list(bars)
    rest = (1 - done) * bars[name] + sum(bars[later] for later in names[names.index(name) + 1 :])
    rest += sum(sum(later.values()) for _, later in PARTS[part + 1 :])
    return _speed * rest
