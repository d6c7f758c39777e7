"""Two ways of doing the same work, timed in turn; the bars they must meet; a table.

A file of benchmarks is a dictionary of functions and one line:

    sys.exit(pairs.main(__doc__, {"stage-1": stage_1, …}))

Each function takes Options and returns Rows. `main` runs those that are named on the command line,
or all, prints the table, writes it as JSON if asked, and exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from mmllm import console

Work = Callable[[], float | None]
"""Does its work; may return seconds of it that do not count."""


@dataclass(frozen=True)
class Options:
    """`pairs` timed pairs, each side of which lasts `seconds` or more."""

    pairs: int = 15
    seconds: float = 2.0


@dataclass(frozen=True)
class Row:
    """One measured `value`. `bar`: what it must not exceed or fall below (None: only reported)."""

    name: str
    value: float
    bar: float | None = None
    side: Literal["at most", "at least"] = "at most"
    unit: str = "x"
    detail: str = ""

    @property
    def met(self) -> bool:
        if self.bar is None:
            return True
        return self.value <= self.bar if self.side == "at most" else self.value >= self.bar


@dataclass(frozen=True)
class Timing:
    """Seconds a call of both sides, pair by pair; `aside`: those of the other that do not count."""

    ours: list[float]
    other: list[float]
    aside: list[float]

    @property
    def ratio(self) -> float:
        """Median over pairs of ours / other: what slows the machine slows both of a pair."""
        return statistics.median(a / b for a, b in zip(self.ours, self.other, strict=True))

    def __str__(self) -> str:
        spread = [a / b for a, b in zip(self.ours, self.other, strict=True)]
        ours, other = (statistics.median(side) for side in (self.ours, self.other))
        return (
            f"{ours:.3f} s against {other:.3f} s, {len(spread)} pairs, "
            f"{min(spread):.3f} to {max(spread):.3f}"
        )


def timed(ours: Work, other: Work, options: Options) -> Timing:
    """Both sides in turn, the one that goes first alternating; two untimed calls of each tell how
    many calls last long enough (the same number on both sides)."""
    fastest = min(_seconds(work, 1)[0] for work in (ours, other) for _ in range(2))
    calls = max(math.ceil(options.seconds / fastest), 1)
    timing = Timing([], [], [])
    for pair in range(options.pairs):
        sides = [(ours, timing.ours, []), (other, timing.other, timing.aside)]
        for work, times, asides in sides if pair % 2 == 0 else reversed(sides):
            seconds, aside = _seconds(work, calls)
            times.append(seconds)
            asides.append(aside)
    return timing


def main(
    about: str,
    bars: Mapping[str, Callable[[Options], Iterable[Row]]],
    only_by_name: Collection[str] = (),
) -> int:
    """The command line of a file of benchmarks; returns its exit code. Bars in `only_by_name` are
    not among all."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bars", nargs="*", metavar="BAR", help=f"of {', '.join(bars)}; or all")
    parser.add_argument("--pairs", type=int, default=Options.pairs)
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="each, at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if unknown := set(given.bars) - bars.keys():
        parser.error(f"no bar {', '.join(sorted(unknown))}; there are {', '.join(bars)}")
    torch.set_num_threads(given.threads)
    rows: list[Row] = []
    for name in given.bars or [bar for bar in bars if bar not in only_by_name]:
        began = time.perf_counter()
        measured = list(bars[name](Options(given.pairs, given.seconds)))
        console.note(f"{name}: {time.perf_counter() - began:.0f} s")
        rows += measured
        for row in measured:
            console.echo(_line(row))
    if given.json:
        facts = {**_machine(given.threads), "pairs": given.pairs, "seconds": given.seconds}
        table = [{**asdict(row), "met": row.met} for row in rows]
        given.json.write_text(json.dumps({**facts, "rows": table}, indent=1), encoding="utf-8")
    return 0 if all(row.met for row in rows) else 1


def _seconds(work: Work, calls: int) -> tuple[float, float]:
    """Mean seconds of a call: those that count, and those that do not."""
    gc.collect()
    began = time.perf_counter()
    aside = sum(work() or 0.0 for _ in range(calls))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began - aside) / calls, aside / calls


def _line(row: Row) -> str:
    value = f"{row.value:,.3f}" if row.value < 100 else f"{row.value:,.0f}"
    bar = "" if row.bar is None else f"{row.side} {row.bar:g}"
    verdict = "" if row.bar is None else "met" if row.met else "NOT MET"
    return f"{row.name:44} {value:>9} {row.unit:9} {bar:14} {verdict:8} {row.detail}".rstrip()


def _machine(threads: int) -> dict[str, object]:
    """What the figures depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
