"""What is loaded once for an evaluation: test items, label vocabularies, judges and probes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmllm import mini
from mmllm.data.sources import read_text
from mmllm.evaluation import everyday
from mmllm.evaluation.judges import Judge, altered_items, build_judge
from mmllm.evaluation.labels import LabelMatcher
from mmllm.evaluation.metrics import Metric, accuracy_metric, with_threshold
from mmllm.evaluation.prompts import EvalItem, evenly_spaced, read_test_items
from mmllm.evaluation.report import EvaluationReport
from mmllm.evaluation.tasks import JUDGE_THRESHOLD, Task

SHORT_RUN_ITEMS = 24
"""Items per task at most after a few minutes' training, so that `make demo` stays short."""


class EvaluationResources:
    """What the measurements of a model and its baseline share: items, labels, judges and probes.

    Args:
        selected: names of tasks.
        limit: items per task at most.
        short_run: use the thresholds of a few minutes' training, and at most SHORT_RUN_ITEMS items
            per task.
        baseline: a saved report, whose metrics of frozen parts are reused; not with a limit, which
            makes them other metrics.
    """

    def __init__(
        self,
        selected: Sequence[str],
        limit: int | None,
        *,
        short_run: bool = False,
        baseline: EvaluationReport | None = None,
    ):
        self.selected = selected
        self.limit = limit
        self.short_run = short_run
        self.data = mini.locate("data")
        self.items = read_test_items(self.data / "tests.jsonl.gz")
        self.probes: dict[str, Metric] = {}
        """Metrics of linear probes by modality and fingerprint of the encoder."""
        self._baseline = baseline if limit is None else None
        self._judges: dict[str, tuple[Judge, Metric]] = {}
        self.visual_labels = LabelMatcher(_read_json(self.data / "concepts.json"))
        self.sound_labels = LabelMatcher(_read_json(self.data / "sounds.json.gz")["concepts"])

    def judge(self, modality: str) -> Judge:
        """The judge of a modality, validated on altered real items when it is first used."""
        if modality not in self._judges:
            start = time.perf_counter()
            judge = build_judge(modality, data=self.data)
            num = min(self.limit or 200, 200)
            validation = judge.validate(altered_items(modality, judge, data=self.data, num=num))
            num_correct = round(validation.top5 * validation.n)
            correct = [True] * num_correct + [False] * (validation.n - num_correct)
            metric = accuracy_metric(f"judge/{modality}: real, altered", correct, start)
            self._judges[modality] = judge, with_threshold(metric, JUDGE_THRESHOLD)
        return self._judges[modality][0]

    def judge_metrics(self) -> list[Metric]:
        """Validation of the judges that were used."""
        return [metric for _, metric in self._judges.values()]

    def labels(self, item: EvalItem) -> LabelMatcher:
        """The vocabulary of an item: that of sounds if it shows nothing else."""
        modalities = {medium.modality for turn in item.turns for m in turn for medium in m.media}
        return self.sound_labels if modalities == {"audio"} else self.visual_labels

    def heldout_questions(self) -> list[str]:
        """Held-out ways to ask what an image shows."""
        return _read_json(self.data / "prompts.json")["ask_image"]["heldout"]

    def reusable_metrics(self, task: str, part: str, fingerprint: str) -> list[Metric]:
        """Return the baseline's metrics of a task, if its frozen part is the same.

        Args:
            task: the name of the task.
            part: the frozen part that alone decides the result, for example "decoders.image".
            fingerprint: that of the part now.

        Returns:
            The metrics; empty without a baseline, or if the fingerprints differ.
        """
        baseline = self._baseline
        if baseline is None or baseline.facts["fingerprints"].get(part) != fingerprint:
            return []
        return [
            metric
            for metric in baseline.metrics
            if metric.name == task or metric.name.startswith(f"{task},")
        ]

    def items_of(self, task: Task) -> list[EvalItem]:
        """The items that a task is measured on."""
        num = self.num_items(task.max_items)
        return evenly_spaced(self.items.get(task.name, []), num)

    def requests(self) -> list[EvalItem]:
        """The everyday requests of the selected kinds."""
        chosen = [task for task in everyday.TASKS if task in self.selected]
        by_task = everyday.read_requests(self.data) if chosen else {}
        num = self.num_items(everyday.NUM_OF_A_KIND)
        return [item for task in chosen for item in evenly_spaced(by_task[task], num)]

    def num_items(self, max_items: int) -> int:
        """The number of items of a task that has `max_items` at most."""
        limit = self.limit or (SHORT_RUN_ITEMS if self.short_run else max_items)
        return min(max_items, limit)


def _read_json(file: Path) -> Any:
    return json.loads(read_text(file))
