"""The report of `mmllm data check`: the problems that were found, and a table of them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class RowProblem:
    """One problem of one row.

    Attributes:
        dataset: the key of the dataset in the stage.
        row: the name of the row.
        kind: a key of `checking.KINDS`, "duplicate" or "tag".
    """

    dataset: str
    row: str
    kind: str
    message: str


@dataclass
class DatasetFindings:
    """The results for one dataset.

    Attributes:
        rows: number of rows of the dataset.
        read: number of rows that were checked.
        media: number of media by modality and direction ("image in", "audio out").
        tokens: number of tokens of each rendered row.
    """

    rows: int
    read: int = 0
    media: Counter[str] = field(default_factory=Counter)
    tokens: array[int] = field(default_factory=lambda: array("L"))
    problems: list[RowProblem] = field(default_factory=list)


@dataclass
class DataReport:
    """The results of `checking.check`.

    Attributes:
        findings: results by dataset.
        page: the HTML page that shows samples.
        max_length: maximum number of tokens of a row.
        complete: False if the check was interrupted by Ctrl-C.
    """

    findings: dict[str, DatasetFindings]
    page: Path
    max_length: int | None = None
    complete: bool = True

    @property
    def problems(self) -> list[RowProblem]:
        """The problems of all datasets."""
        return [problem for found in self.findings.values() for problem in found.problems]


def table(report: DataReport, examples: int = 3) -> Iterator[str]:
    """Yield the lines of a report for a terminal: a table, then some problems of each kind.

    Args:
        report: the result of `checking.check`.
        examples: maximum number of problems shown of each kind.
    """
    kinds = sorted({problem.kind for problem in report.problems})
    modalities = sorted({key for found in report.findings.values() for key in found.media})
    rows = [["dataset", "rows", "read", *modalities, *kinds]]
    for name, found in report.findings.items():
        counts = Counter(problem.kind for problem in found.problems)
        numbers = [found.rows, found.read, *(found.media[key] for key in modalities)]
        rows.append([name, *(f"{n:,}" for n in numbers), *(f"{counts[k]:,}" for k in kinds)])
    yield from _aligned(rows)
    if "too long" in kinds:
        yield from _lengths(report)
    for kind in kinds:
        own = [problem for problem in report.problems if problem.kind == kind]
        yield ""
        yield f"{kind}: {len(own):,}"
        for problem in own[:examples]:
            yield f"  {problem.dataset}/{problem.row}: {problem.message}"
        if len(own) > examples:
            yield f"  … all of them: {report.page.parent / 'problems.jsonl'}"


def _lengths(report: DataReport) -> Iterator[str]:
    """Yield a table of the number of rows of each dataset that fit into various lengths."""
    longest = max(max(found.tokens, default=1) for found in report.findings.values())
    powers = {2**power for power in range(6, longest.bit_length() + 1)}
    steps = sorted(powers | {report.max_length or longest})
    rows = [["rows that fit in", *(f"{step:,}" for step in steps), "longest"]]
    for name, found in report.findings.items():
        counts = [sum(tokens <= step for tokens in found.tokens) for step in steps]
        rows.append([name, *map("{:,}".format, [*counts, max(found.tokens, default=0)])])
    yield ""
    yield from _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines of aligned columns: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join([row[0].ljust(len(first)), *rest]).rstrip()
