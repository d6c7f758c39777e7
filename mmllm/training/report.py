"""What a person sees of a run while it goes on: numbers, curves, samples, skipped items."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from mmllm.config import SamplesConfig, StageConfig
from mmllm.conversation import MEDIA, Medium, Message, user
from mmllm.errors import TrainingError
from mmllm.model import AnyToAny
from mmllm.training.summary import write_report
from mmllm.utils import files

logger = logging.getLogger(__name__)

ALLOWED_SKIPS = 10
"""So many skipped items never end a run, whatever its share: early on one is a large share."""

Losses = Callable[[], dict[str, float]]
"""Reads the mean losses of a step, by name."""


def written(path: Path) -> contextlib.AbstractContextManager[None]:
    """Raises TrainingError for what the disk does not take below a path of the run."""
    return files.write_errors(path, TrainingError, "free some space and go on with --resume")


class Journal:
    """metrics.jsonl, one line a step; skipped.json; curves.png; report.html. `log` is told what
    metrics.jsonl is told, for trackers. The losses of a step are not read before `flush`: reading
    them waits for the device."""

    def __init__(
        self,
        output: Path,
        start: int,
        stage: StageConfig,
        *,
        main: bool,
        log: Callable[[dict[str, float], int], object] = lambda *_: None,
    ):
        self.output = output
        self.log = log
        self.main = main
        self.stage = stage
        self.items = 0
        self.nonfinite = 0
        self.skipped: Counter[tuple[str, str]] = Counter()  # (name, error) -> draws
        self._recent: deque[dict[str, float]] = deque(maxlen=20)
        self._waiting: tuple[int, Losses, float] | None = None
        self._file = output / "metrics.jsonl"
        if main:
            with written(self._file):
                output.mkdir(parents=True, exist_ok=True)
                kept = [row for row in self._rows() if row["step"] <= start]
                files.atomic_write(self._file, "".join(json.dumps(row) + "\n" for row in kept))

    def prealigned(self, found: dict[str, float]) -> None:
        """Say what pre-alignment reached: shares of inputs, losses of outputs."""
        for name, value in found.items():
            what = "media told right" if name.startswith("input") else "loss"
            logger.info("  pre-alignment %-32s %s %.3f", name, what, value)

    def step(
        self, step: int, losses: Losses, skipped: list[tuple[str, str]], *, seconds: float
    ) -> None:
        """Note one step. Raises TrainingError when more items cannot be read than the stage
        allows."""
        assert self._waiting is None
        self._waiting = step, losses, seconds
        self.items += self.stage.batch_size
        for entry in skipped:
            if entry not in self.skipped:  # the same one comes again in every epoch
                logger.warning("skipped %s: %s", *entry)
            self.skipped[entry] += 1
        if self.main and skipped:
            rows = [
                {"item": name, "error": error, "times": times}
                for (name, error), times in self.skipped.items()
            ]
            file = self.output / "skipped.json"
            with written(file):
                files.atomic_write(file, json.dumps(rows, indent=1))
        self._check_skipped(step)

    def flush(self) -> None:
        """Wait for the last step and note its losses. Raises TrainingError when more steps in a row
        are not finite than the stage allows."""
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
        """Note a held-out loss."""
        self.flush()
        self.log({f"validation/{name}": value for name, value in values.items()}, step)
        if self.main:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            logger.info("step %d  held out: %s", step, shown)
            self._write({"step": step, **{f"validation/{k}": v for k, v in values.items()}})

    def is_best(self, name: str, step: int) -> bool:
        """Whether the value of `name` at `step` is the lowest so far."""
        values = {row["step"]: row[name] for row in self._rows() if name in row}
        return step in values and values[step] <= min(values.values())

    def finish(self) -> None:
        """The page of the whole stage."""
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
            with written(self.output / "report.html"):
                write_report(self.output, self._rows(), self.stage.batch_size)

    def latest(self) -> dict[str, str]:
        """Means over the last steps, for the progress bar."""
        names = {name for values in self._recent for name in values}
        means = {}
        for name in sorted(names):
            found = [values[name] for values in self._recent if name in values]
            means[name] = f"{sum(found) / len(found):.3f}"
        return means

    def curves(self) -> None:
        """curves.png: one panel a loss, training and held out."""
        if not self.main:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = self._rows()
        skip = {"step", "seconds"}
        names = sorted({n for row in rows for n in row if n not in skip and "validation" not in n})
        figure, axes = pyplot.subplots(
            1, len(names), figsize=(4 * len(names), 3), squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes[0], names, strict=True):
            steps = [row["step"] for row in rows if name in row]
            values = [row[name] for row in rows if name in row]
            axis.plot(steps, values, linewidth=0.6, alpha=0.5)
            axis.plot(steps, _smooth(values), linewidth=1.4, label="training")
            held = [row for row in rows if f"validation/{name}" in row]
            if held:
                axis.plot(
                    [row["step"] for row in held],
                    [row[f"validation/{name}"] for row in held],
                    "o-",
                    markersize=3,
                    label="held out",
                )
            axis.set_title(name)
            axis.set_xlabel("step")
            axis.legend(fontsize="small")
        picture = io.BytesIO()
        figure.savefig(picture, dpi=100)
        pyplot.close(figure)
        file = self.output / "curves.png"
        with written(file):
            files.atomic_write(file, picture.getvalue())

    def _write(self, row: dict[str, Any]) -> None:
        with written(self._file), self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def _rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds, but for lines that a kill or a power loss has cut."""
        rows = []
        if self._file.is_file():
            for line in self._file.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict) and "step" in row:
                        rows.append(row)
        return rows


def write_samples(model: AnyToAny, samples: SamplesConfig, output: Path, step: int) -> None:
    """Answer the fixed prompts and write samples/step-N/ with a page that shows them."""
    from mmllm.gallery import GalleryEntry, write_gallery
    from mmllm.inference.chat import Chat

    prompts: list[Message] = [user(text) for text in samples.prompts]
    for line in samples.media:  # "image mini:data/pictures/x.webp What is this?"
        modality, file, text = line.split(" ", 2)
        prompts.append(user(_shown(modality, file), text))
    chat = Chat(model)
    replies = chat.reply_many([[p] for p in prompts], seeds=[0] * len(prompts), max_new_tokens=48)
    folder = output / "samples" / f"step-{step:08d}"
    entries = [
        GalleryEntry((prompt, reply.message))
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    with written(folder):
        write_gallery(folder, f"{model.config.name}, step {step}", entries)


def _shown(modality: str, file: str) -> Medium:
    from mmllm.data.sources import resolve

    return MEDIA[modality](source=resolve(file))


def _smooth(values: list[float], window: int = 20) -> list[float]:
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]
