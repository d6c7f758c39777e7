"""The result of an evaluation: metrics with their thresholds, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmllm.evaluation.metrics import Metric

MODEL = "mini"
"""Name of the model that is shipped."""

_ABILITIES = {
    "sees": "image->text",
    "hears": "audio->text",
    "draws": "text->image",
    "sounds": "text->audio",
    "animates": "text->video",
}
"""What a person would call a task -> the task whose accuracy says how well it is done."""

_RENAMED_KEYS = {
    "report": {"figures": "metrics", "beside": "baseline"},
    "metric": {"row": "name", "bar": "threshold"},
    "item": {"row": "task", "right": "correct"},
}
"""Former key of a report's JSON -> its name. Reports written before version 0.2 are still read."""
_RENAMED_METRICS = {
    f"batch of 8/float32, {modality} apart": f"batch of 8/float32, {modality} max difference"
    for modality in ("image", "audio", "video")
}


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics of a model, every scored item behind them, and what they were measured with.

    Attributes:
        model: name or path of the model.
        metrics: the lines of the table.
        items: `mmllm.evaluation.tasks.ScoredItem` as plain data.
        facts: command, versions, device, precision, fingerprints of the frozen parts, seconds.
        baseline: the report of the model that this one is compared with.
    """

    model: str
    metrics: tuple[Metric, ...]
    items: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    baseline: EvaluationReport | None = None

    @property
    def met(self) -> bool:
        """Whether no threshold that could be checked is missed."""
        return all(metric.met is not False for metric in self.metrics)

    def metric(self, name: str) -> Metric | None:
        """The metric of this name; None if it was not measured."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def save(self, path: Path) -> Path:
        """Write the report as JSON and return `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> EvaluationReport:
        """Read what `save` wrote, in this version or before.

        Raises:
            OSError, ValueError, KeyError, TypeError: the file is not a report.
        """
        return cls._from_tree(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def _from_tree(cls, tree: Mapping[str, Any]) -> EvaluationReport:
        tree = _with_present_keys(tree, "report")
        return cls(
            model=tree["model"],
            metrics=tuple(_metric_from(entry) for entry in tree["metrics"]),
            items=tuple(_with_present_keys(item, "item") for item in tree["items"]),
            facts=tree["facts"],
            baseline=cls._from_tree(tree["baseline"]) if tree["baseline"] else None,
        )

    def summary(self, *, short_run: bool = False) -> str:
        """What the model can do, a line each, and which thresholds it misses.

        Args:
            short_run: it was trained for minutes, so that missed thresholds are no surprise.

        Returns:
            Aligned text; with a baseline the model's own column is headed "yours".
        """
        reports = {self.model: self}
        if self.baseline:
            reports = {"yours": self, self.baseline_name: self.baseline}
        lines = [["", "task", *reports, "threshold"]]
        for ability, task in _ABILITIES.items():
            own = self.metric(task)
            if own is not None:
                metrics = [report.metric(task) for report in reports.values()]
                values = [_number(metric.value) if metric else "" for metric in metrics]
                lines.append([ability, task, *values, own.threshold.partition(" ")[0]])
        return f"{_aligned(lines)}\n{self._verdict(short_run)}\n--all prints every metric."

    def _verdict(self, short_run: bool) -> str:
        """How many thresholds are missed, and which."""
        checked = [metric for metric in self.metrics if metric.met is not None]
        missed = [metric.name for metric in checked if not metric.met]
        if not missed:
            return f"All {len(checked)} thresholds are met."
        expected = ", as expected after minutes of training (see docs/mini.md)" if short_run else ""
        names = "; ".join(missed)
        return f"{len(missed)} of {len(checked)} thresholds are missed{expected}: {names}."

    @property
    def baseline_name(self) -> str:
        """The head of the baseline's column."""
        assert self.baseline is not None
        return f"shipped {MODEL}" if self.baseline.model == MODEL else self.baseline.model

    def table(self) -> str:
        """The metrics as aligned text, one line each; the baseline's values in the last column."""
        head = ["metric", "n", "value", "95 %", "threshold", "met"]
        lines = [
            [
                metric.name,
                str(metric.n),
                _number(metric.value),
                "" if metric.low is None else f"{metric.low:.3f}-{metric.high:.3f}",
                metric.threshold,
                {True: "yes", False: "NO", None: ""}[metric.met],
            ]
            for metric in self.metrics
        ]
        if self.baseline:
            head.append(self.baseline_name)
            for line, metric in zip(lines, self.metrics, strict=True):
                other = self.baseline.metric(metric.name)
                line.append(_number(other.value) if other else "")
        return _aligned([head, *lines])


def _metric_from(tree: Mapping[str, Any]) -> Metric:
    fields = _with_present_keys(tree, "metric")
    fields["name"] = _RENAMED_METRICS.get(fields["name"], fields["name"])
    return Metric(**fields)


def _with_present_keys(tree: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {_RENAMED_KEYS[kind].get(key, key): value for key, value in tree.items()}


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of even width; the first aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
