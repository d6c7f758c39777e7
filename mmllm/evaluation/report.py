"""What was measured: figures with their bars, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One row of the table. `low` and `high`: the 95 % Wilson interval of a share.

    `met` is None without a bar, or where the figure that the bar is a part of was not measured.
    """

    row: str
    n: int
    value: float
    low: float | None = None
    high: float | None = None
    bar: str = ""
    met: bool | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """Figures of a model, every item behind them, and what they were measured with."""

    model: str
    figures: tuple[Figure, ...]
    items: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    beside: Report | None = None

    @property
    def met(self) -> bool:
        """Whether every bar that could be checked is met."""
        return all(figure.met is not False for figure in self.figures)

    def figure(self, row: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.row == row), None)

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> Report:
        return cls._from_tree(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def _from_tree(cls, tree: Mapping[str, Any]) -> Report:
        return cls(
            model=tree["model"],
            figures=tuple(Figure(**figure) for figure in tree["figures"]),
            items=tuple(tree["items"]),
            facts=tree["facts"],
            beside=cls._from_tree(tree["beside"]) if tree["beside"] else None,
        )

    def table(self) -> str:
        """The figures as text, one line each."""
        head = ["row", "n", "value", "95 %", "bar", "met"]
        lines = [
            [
                figure.row,
                str(figure.n),
                _number(figure.value),
                "" if figure.low is None else f"{figure.low:.3f}-{figure.high:.3f}",
                figure.bar,
                {True: "yes", False: "NO", None: ""}[figure.met],
            ]
            for figure in self.figures
        ]
        if self.beside:
            head.append(self.beside.model)
            for line, figure in zip(lines, self.figures, strict=True):
                other = self.beside.figure(figure.row)
                line.append(_number(other.value) if other else "")
        return _aligned([head, *lines])


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `n` (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of even width; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
