"""Evaluates a model, and a baseline if there is one, over the table of tasks."""

from __future__ import annotations

import logging
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmllm import console
from mmllm.conversation import Message, Text
from mmllm.errors import ConfigError
from mmllm.evaluation import composing, everyday, insight, reasoning
from mmllm.evaluation.everyday_judges import load_judges
from mmllm.evaluation.measurement import ModelMeasurement
from mmllm.evaluation.prompts import EvalResponse
from mmllm.evaluation.report import EvaluationReport
from mmllm.evaluation.resources import EvaluationResources
from mmllm.evaluation.tasks import TASKS
from mmllm.gallery import GalleryEntry, write_gallery
from mmllm.inference.chat import Chat
from mmllm.inference.loading import load
from mmllm.utils.progress import progress_bar
from mmllm.version import __version__

logger = logging.getLogger(__name__)

_ABSOLUTE = re.compile(r"(?<![^=])/(?:[^/]+/)*")
"""The folder of an absolute path, alone or after `--option=`."""
_OTHER_TASKS = ("perplexity", "batch of 8")
_PROGRAMS = reasoning.ROWS | insight.ROWS | composing.ROWS
"""Rows that are measured only where they are asked for."""
_PACKAGES = ("torch", "transformers", "diffusers", "peft", "timm", "scikit-learn", "numpy")


def evaluate(
    model: str,
    *,
    tasks: Sequence[str] | None = None,
    json_path: Path | None = None,
    baseline: str | None = None,
    limit: int | None = None,
    gallery: Path | None = None,
    short_run: bool = False,
    whole_table: bool = False,
) -> EvaluationReport:
    """Measure a model, print the main results, and write JSON and a gallery where requested.

    Args:
        model: a name, a checkpoint or run folder, or a YAML.
        tasks: names of tasks, or their beginning ("routing"); unless given, all but those of
            `reasoning`, `insight`, `composing` and `everyday`.
        json_path: where the report is written.
        baseline: a second model, measured alike, or the JSON file of a report. Its values are the
            last column. What it reports of a frozen part that both models have is not measured
            again.
        limit: items per task at most, for a quick look.
        gallery: folder for a page of test items and responses.
        short_run: use the thresholds of a few minutes' training, and fewer items.
        whole_table: print every metric, as where `tasks` are given.

    Returns:
        The report, the baseline's inside it.

    Raises:
        ConfigError: for an unknown task or a file that is not a report.
        AssetError: where everyday requests are asked for and there is no judge of them.
    """
    selected = _selected_tasks(tasks)
    saved = _load_report(baseline) if baseline and baseline.endswith(".json") else None
    resources = EvaluationResources(selected, limit, short_run=short_run, baseline=saved)
    report, responses = measure(model, resources)
    if baseline:
        report = replace(report, baseline=saved or measure(baseline, resources)[0])
    if json_path:
        report.save(json_path)
    console.echo(report.table() if whole_table or tasks else report.summary(short_run=short_run))
    if gallery:
        write_gallery(gallery, f"{model}: held-out items", _gallery_entries(report, responses))
    return report


def measure(
    model: str, resources: EvaluationResources
) -> tuple[EvaluationReport, list[EvalResponse]]:
    """Load a model and measure it on the selected tasks.

    Args:
        model: what `mmllm.load` takes.
        resources: the tasks, test items and judges.

    Returns:
        The report, and the responses that the gallery shows.
    """
    start = time.perf_counter()
    tasks = [task for task in TASKS if task.name in resources.selected]
    requests = resources.requests()
    judges = load_judges() if requests else {}
    chat = load(model)
    measurement = ModelMeasurement(resources, model, chat)
    programs = {name: row for name, row in _PROGRAMS.items() if name in resources.selected}
    for name in [*programs]:
        if missing := composing.missing_judges(name):
            logger.warning("%s: left out, no judge of %s", name, " and ".join(missing))
            del programs[name]
    total = sum(len(resources.items_of(task)) for task in tasks)
    total += sum(resources.num_items(row[1]) for row in programs.values()) + len(requests)
    with progress_bar("evaluation", total=total, unit="item") as bar:
        for task in tasks:
            bar.set_description(f"{model} {task.name}")
            measurement.measure_task(task, bar)
        if "perplexity" in resources.selected:
            measurement.measure_perplexity(bar)
        if "batch of 8" in resources.selected:
            bar.set_description(f"{model} batch of 8")
            measurement.measure_batching()
        if requests:
            bar.set_description(f"{model} everyday")
            measurement.measure_requests(requests, judges, bar)
        for name, (measure_row, num) in programs.items():
            bar.set_description(f"{model} {name}")
            num = resources.num_items(num)
            measurement.metrics += measure_row(chat, resources.data, num, bar.update)
    facts = _facts(chat) | {"seconds": round(time.perf_counter() - start, 1)}
    items = tuple(asdict(scored) for scored in measurement.scored)
    report = EvaluationReport(model, tuple(measurement.finished_metrics()), items, facts)
    return report, measurement.responses


def _selected_tasks(names: Sequence[str] | None) -> list[str]:
    """The tasks with these names or these beginnings of names, in the order of the table."""
    default = [task.name for task in TASKS] + list(_OTHER_TASKS)
    if names is None:
        return default
    known = [*default, *everyday.TASKS, *_PROGRAMS]
    for name in names:
        if not any(_selects(name, task) for task in known):
            raise ConfigError(f"evaluate: unknown task {name!r}; known are {', '.join(known)}")
    return [task for task in known if any(_selects(name, task) for name in names)]


def _selects(name: str, task: str) -> bool:
    return task == name or task.startswith(f"{name}/")


def _load_report(path: str) -> EvaluationReport:
    try:
        return EvaluationReport.load(Path(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"evaluate: {path} is no report of `mmllm evaluate`: {error}") from error


def _facts(chat: Chat) -> dict[str, Any]:
    """Command without folders of this machine, versions, device, precision and fingerprints of the
    frozen parts."""
    model = chat.model
    return {
        "command": " ".join(_ABSOLUTE.sub("", word) for word in sys.argv),
        "versions": {
            "mmllm": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "device": str(model.device),
        "dtype": str(model.llm.embedding.weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "fingerprints": {
            **{f"encoders.{key}": part.fingerprint for key, part in model.encoders.items()},
            **{f"decoders.{key}": part.fingerprint for key, part in model.decoders.items()},
        },
    }


def _gallery_entries(
    report: EvaluationReport, responses: Sequence[EvalResponse]
) -> list[GalleryEntry]:
    """A few items of every task, correct or wrong."""
    correct = {item["id"]: item["correct"] for item in report.items}
    entries = []
    for response in responses:
        messages = tuple(
            Message(message.role, tuple(part for part in message.parts if part != Text("")))
            for message in response.messages
        )
        verdict = "right" if correct[response.item.id] else "wrong"
        entries.append(GalleryEntry(messages, f"{response.item.task}: {verdict}"))
    return entries
