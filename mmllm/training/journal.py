"""The journal of a run: metrics.jsonl, skipped items, curves, and the report at its end."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from mmllm.config import StageConfig
from mmllm.errors import TrainingError
from mmllm.training.curves import plot_curves
from mmllm.training.report import write_report
from mmllm.utils import files

logger = logging.getLogger(__name__)

LOG_SECONDS = 300.0
"""Time between two lines of `Journal.log_progress`."""
ALLOWED_SKIPS = 10
"""Skipped items below which a run never ends: early on, one is a large fraction of all."""

Losses = Callable[[], dict[str, float]]
"""A function that returns the mean losses of a step by name."""


def write_errors(path: Path) -> contextlib.AbstractContextManager[None]:
    """Context manager that raises TrainingError if writing below `path` fails."""
    return files.write_errors(path, TrainingError, "free some space and go on with --resume")


class Journal:
    """Writes metrics.jsonl (one line a step), skipped.json, curves.png and report.html.

    The losses of a step are read by `flush`, because reading them waits for the device.
    """

    def __init__(
        self,
        output: Path,
        start: int,
        stage: StageConfig,
        *,
        main: bool,
        log: Callable[[dict[str, float], int], object] = lambda *_: None,
    ):
        """
        Args:
            output: folder of the run.
            start: step that the run begins with; later lines of an earlier run are dropped.
            stage: the limits of skipped items and of losses that are not finite.
            main: whether this process writes the files.
            log: also called with the values and step of every line, for trackers.
        """
        self.output = output
        self.log = log
        self.main = main
        self.stage = stage
        self.items = 0
        self.nonfinite = 0
        self.skipped: Counter[tuple[str, str]] = Counter()  # (name, error) -> draws
        self._recent: deque[dict[str, float]] = deque(maxlen=20)
        self._waiting: tuple[int, Losses, float] | None = None
        self._logged = time.monotonic()
        self._file = output / "metrics.jsonl"
        if main:
            with write_errors(self._file):
                output.mkdir(parents=True, exist_ok=True)
                kept = [row for row in self._rows() if row["step"] <= start]
                files.atomic_write(self._file, "".join(json.dumps(row) + "\n" for row in kept))

    def prealigned(self, scores: dict[str, float]) -> None:
        """Log the scores of pre-alignment: accuracies of inputs, losses of outputs."""
        for name, value in scores.items():
            what = "accuracy" if name.startswith("input") else "loss"
            logger.info("  pre-alignment %-32s %s %.3f", name, what, value)

    def step(
        self, step: int, losses: Losses, skipped: list[tuple[str, str]], *, seconds: float
    ) -> None:
        """Record one step; its losses are read from the device later.

        Args:
            step: the number of the step, from 1.
            losses: the losses of the step, not yet waited for.
            skipped: (item, error) of each item that could not be read.
            seconds: duration of the step.

        Raises:
            TrainingError: more items were skipped than the stage allows.
        """
        assert self._waiting is None
        self._waiting = step, losses, seconds
        self.items += self.stage.batch_size
        for entry in skipped:
            if entry not in self.skipped:  # it is skipped again in every epoch
                logger.warning("skipped %s: %s", *entry)
            self.skipped[entry] += 1
        if self.main and skipped:
            rows = [
                {"item": name, "error": error, "times": times}
                for (name, error), times in self.skipped.items()
            ]
            file = self.output / "skipped.json"
            with write_errors(file):
                files.atomic_write(file, json.dumps(rows, indent=1))
        self._check_skipped(step)

    def flush(self) -> None:
        """Wait for the last step and write its losses.

        Raises:
            TrainingError: more steps in a row had a loss that is not finite than the stage allows.
        """
        if self._waiting is None:
            return
        (step, losses, seconds), self._waiting = self._waiting, None
        values = losses()
        self._recent.append(values)
        self.log(values, step + 1)
        if self.main:
            rounded = {name: round(value, 6) for name, value in values.items()}
            self._write({"step": step + 1, "seconds": round(seconds, 3), **rounded})
        self.nonfinite = 0 if math.isfinite(values["loss"]) else self.nonfinite + 1
        if self.nonfinite > self.stage.max_nonfinite:
            raise TrainingError(
                f"{self.stage.name}: the loss was not finite in {self.nonfinite} steps in a row, "
                f"last at step {step}; lower the learning rates or train in float32 (precision=no)"
            )

    def _check_skipped(self, step: int) -> None:
        total = self.skipped.total()
        if total > max(ALLOWED_SKIPS, self.stage.max_skip_fraction * self.items):
            names = "; ".join(f"{name}: {error}" for name, error in islice(self.skipped, 5))
            share = self.stage.max_skip_fraction
            raise TrainingError(
                f"{total} of {self.items} items could not be read by step {step + 1} "
                f"(stage.max_skip_fraction {share}); see {self.output}/skipped.json; first: {names}"
            )

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Write held-out losses to the log, the trackers and the file.

        Args:
            step: optimizer steps taken.
            values: the losses by name.
        """
        self.flush()
        self.log({f"validation/{name}": value for name, value in values.items()}, step)
        if self.main:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            logger.info("step %d  held out: %s", step, shown)
            self._write({"step": step, **{f"validation/{k}": v for k, v in values.items()}})

    def is_best(self, name: str, step: int) -> bool:
        """Return whether a value is the lowest of the run so far.

        Args:
            name: a column of the file, for example "validation/loss".
            step: the step to compare with all others.
        """
        values = {row["step"]: row[name] for row in self._rows() if name in row}
        return step in values and values[step] <= min(values.values())

    def finish(self) -> None:
        """Write the report of the whole run."""
        self.flush()
        if self.skipped:
            total = self.skipped.total()
            logger.warning(
                "%d of %d items drawn (%.1f %%) were skipped, %d different ones: %s; `mmllm data "
                "check` lists all of the dataset's",
                total,
                self.items,
                100 * total / self.items,
                len(self.skipped),
                self.output / "skipped.json",
            )
        if self.main:
            with write_errors(self.output / "report.html"):
                write_report(self.output, self._rows(), self.stage.batch_size)

    def latest(self) -> dict[str, str]:
        """Means over the last steps, for the progress bar."""
        names = {name for values in self._recent for name in values}
        means = {}
        for name in sorted(names):
            recent = [values[name] for values in self._recent if name in values]
            means[name] = f"{sum(recent) / len(recent):.3f}"
        return means

    def log_progress(self, done: int) -> None:
        """Log the means over the last steps, every few minutes, where no bar shows them."""
        if self._recent and time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            means = "  ".join(f"{name} {value}" for name, value in self.latest().items())
            logger.info("step %d of %d  %s", done, self.stage.steps, means)

    def curves(self) -> None:
        """curves.png: one panel a loss, training and held out."""
        if not self.main:
            return
        file = self.output / "curves.png"
        with write_errors(file):
            plot_curves(file, self._rows())

    def _write(self, row: dict[str, Any]) -> None:
        with write_errors(self._file), self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def _rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without those that a kill or a power loss has truncated."""
        rows = []
        if self._file.is_file():
            for line in self._file.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict) and "step" in row:
                        rows.append(row)
        return rows
