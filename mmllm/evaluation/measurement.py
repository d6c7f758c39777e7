"""Measures one model: its responses to every task, their scores, and the metrics of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mmllm.conversation import Medium, assistant, user
from mmllm.evaluation import batching, everyday, perplexity, tasks
from mmllm.evaluation.judges import motion
from mmllm.evaluation.metrics import Metric, accuracy_metric, with_threshold
from mmllm.evaluation.probe import probe
from mmllm.evaluation.prompts import (
    EvalItem,
    EvalResponse,
    captions_blocked,
    generate_responses,
)
from mmllm.evaluation.resources import EvaluationResources
from mmllm.evaluation.tasks import ScoredItem, Task
from mmllm.inference.chat import Chat
from mmllm.inference.loading import load

logger = logging.getLogger(__name__)

_BATCHED_TASKS = (
    "image->text",
    "text->image",
    "audio->text",
    "text->audio",
    "routing/text",
    "text->video",
    "text->image+audio",
    "image->audio",
)
"""Tasks of which the batch of eight has one item each."""
_NUM_SHOWN = 4
"""Items of a task that the gallery shows."""
_SHORT_RUN_WINDOWS = 10
"""Windows of each text in a short run."""


class ModelMeasurement:
    """The metrics, scored items and shown responses of one model, collected task by task.

    Args:
        resources: items, judges and thresholds.
        source: what the model was loaded from.
        chat: the model.
    """

    def __init__(self, resources: EvaluationResources, source: str, chat: Chat):
        self.resources = resources
        self.source = source
        self.chat = chat
        self.metrics: list[Metric] = []
        self.scored: list[ScoredItem] = []
        self.responses: list[EvalResponse] = []

    def measure_task(self, task: Task, bar: Any) -> None:
        """Generate the responses of a task and score them; metrics and responses are kept.

        Without test items, or if the model lacks a modality, the task is skipped with a warning.

        Args:
            task: the task.
            bar: tqdm's progress bar, which counts items.
        """
        items = self.resources.items_of(task)
        missing = self._missing(items)
        if missing or not items:
            logger.warning("%s: left out, %s", task.name, missing or "no such test items")
            bar.update(len(items))
            return
        start = time.perf_counter()
        if task.name.startswith("decoder/"):
            if reused := self._reusable_decoder_metrics(task.name):
                self.metrics += reused
                bar.update(len(items))
                return
            responses = self._decode_captions(items, bar)
        else:
            with captions_blocked(self.chat.model):
                responses = generate_responses(
                    self.chat,
                    items,
                    render_media=task.kind != "route",  # only the modalities are looked at
                    on_progress=bar.update,
                )
        if task.kind != "route":  # its media have no data
            self.responses += responses[:_NUM_SHOWN]
        self._add(task.name, self._score(task, responses), start)
        if task.name in ("image->text", "audio->text"):
            self._measure_probe(task.name.partition("->")[0], items)
        elif task.name == "decoder/video":
            self._measure_motion(responses)
        elif task.name == "what-did-you-draw":
            self._measure_as_input(responses)

    def measure_perplexity(self, bar: Any) -> None:
        """Ratio of the perplexities with and without adapters: of every text in data/text, and of
        all of them together."""
        start = time.perf_counter()
        total = perplexity.Perplexity(0, 0.0, 0.0)
        for file in sorted((self.resources.data / "text").glob("*.txt")):
            bar.set_description(f"perplexity {file.stem}")
            text_start = time.perf_counter()
            text = file.read_text(encoding="utf-8")
            num = self.resources.limit or (_SHORT_RUN_WINDOWS if self.resources.short_run else None)
            measured = perplexity.measure(self.chat.model, text, num_windows=num)
            total += measured
            self._add_ratio(f"perplexity/{file.stem}", measured, text_start)
        self._add_ratio("perplexity", total, start)

    def measure_batching(self) -> None:
        """Whether eight conversations in one batch get the replies that each gets alone: with
        thresholds in float32; in bfloat16 the fraction of equal replies is only reported."""
        items = [self.resources.items[name][0] for name in _BATCHED_TASKS]
        missing = self._missing(items)
        if missing:
            logger.warning("batch of 8: left out, %s", missing)
            return
        for dtype in ("float32", "bfloat16"):
            start = time.perf_counter()
            chat = load(self.source, device=str(self.chat.model.device), dtype=dtype)
            agreement = batching.compare(chat, items)
            metric = accuracy_metric(f"batch of 8/{dtype}, same ids", agreement.same, start)
            if dtype == "float32":
                self.metrics.append(with_threshold(metric, 1.0))
                self._add_differences(agreement)
            else:
                self.metrics.append(metric)

    def measure_requests(
        self, requests: Sequence[EvalItem], judges: everyday.Judges, bar: Any
    ) -> None:
        """Ask everyday requests and score the replies; those without a judge are left out.

        Args:
            requests: items of `everyday.read_requests`.
            judges: by modality.
            bar: tqdm's progress bar, which counts items.
        """
        start = time.perf_counter()
        with captions_blocked(self.chat.model):
            responses = generate_responses(self.chat, requests, on_progress=bar.update)
        scored = everyday.score_requests(responses, judges)
        if len(scored) < len(requests):
            missing = [name for name in everyday.MEDIA_RULES if name not in judges]
            logger.warning(
                "everyday: %d of %d requests left out: no judge of %s",
                len(requests) - len(scored),
                len(requests),
                " and ".join(missing),
            )
        ids = {entry.id for entry in scored}
        self.responses += [response for response in responses if response.item.id in ids]
        self.scored += scored
        self.metrics += everyday.request_metrics(scored, requests, start)

    def finished_metrics(self) -> list[Metric]:
        """All metrics, judges first, with the thresholds of the table."""
        routing_tasks = {task.name for task in tasks.TASKS if task.kind == "route"}
        routed = [scored for scored in self.scored if scored.task in routing_tasks]
        if {scored.task for scored in routed} == routing_tasks:
            correct = [scored.correct for scored in routed]
            metric = accuracy_metric("routing", correct, time.perf_counter())
            if not self.resources.short_run:
                metric = with_threshold(metric, tasks.ROUTING_THRESHOLD)
            self.metrics.append(metric)
        values = {metric.name: metric.value for metric in self.metrics}
        table = map(tasks.for_short_run, tasks.TASKS) if self.resources.short_run else tasks.TASKS
        by_name = {task.name: task for task in table}
        metrics = self.resources.judge_metrics()
        for metric in self.metrics:
            task = by_name.get(metric.name)
            metrics.append(metric if task is None else _with_task_threshold(metric, task, values))
        return metrics

    def _score(self, task: Task, responses: Sequence[EvalResponse]) -> list[ScoredItem]:
        if task.kind == "name":
            return [
                tasks.score_name(response, self.resources.labels(response.item))
                for response in responses
            ]
        if task.kind == "route":
            return [tasks.score_route(response) for response in responses]
        modalities = {m for response in responses for m in response.item.modalities}
        judges = {modality: self.resources.judge(modality) for modality in sorted(modalities)}
        return tasks.score_media(responses, judges)

    def _add(self, name: str, scored: Sequence[ScoredItem], start: float) -> None:
        self.scored += scored
        self.metrics.append(accuracy_metric(name, [entry.correct for entry in scored], start))
        if any(entry.top1 is not None for entry in scored):
            top1 = [bool(entry.top1) for entry in scored]
            metric = accuracy_metric(f"{name}, top 1", top1, start)
            self.metrics.append(replace(metric, seconds=0.0))

    def _missing(self, items: Sequence[EvalItem]) -> str:
        """The encoders and decoders that these items need and the model lacks, as text."""
        renderer = self.chat.model.renderer
        inputs = {
            medium.modality
            for item in items
            for turn in item.turns
            for message in turn
            for medium in message.media
        }
        outputs = {modality for item in items for modality in item.modalities}
        missing = [f"no encoder of {modality}" for modality in inputs - renderer.input_keys.keys()]
        missing += [
            f"no decoder of {modality}" for modality in outputs - renderer.output_keys.keys()
        ]
        return ", ".join(sorted(missing))

    def _reusable_decoder_metrics(self, task: str) -> list[Metric]:
        key = self.chat.model.renderer.output_keys[task.partition("/")[2]]
        decoder = self.chat.model.decoders[key]
        return self.resources.reusable_metrics(task, f"decoders.{key}", decoder.fingerprint)

    def _decode_captions(
        self, items: Sequence[EvalItem], bar: Any, batch_size: int = 16
    ) -> list[EvalResponse]:
        """What the decoder alone samples, conditioned on the items' captions."""
        key = self.chat.model.renderer.output_keys[items[0].modalities[0]]
        decoder = self.chat.model.decoders[key]
        responses = []
        for start in range(0, len(items), batch_size):
            group = items[start : start + batch_size]
            media = decoder.sample(
                decoder.encode_captions([item.caption for item in group]),
                generators=[torch.Generator().manual_seed(item.seed) for item in group],
            )
            responses += [
                EvalResponse(item, (user(item.caption), assistant(medium)))
                for item, medium in zip(group, media, strict=True)
            ]
            bar.update(len(group))
        return responses

    def _measure_probe(self, modality: str, items: Sequence[EvalItem]) -> None:
        """Accuracy of a linear probe on the encoder's features, once per encoder."""
        model = self.chat.model
        key, _ = model.renderer.input_keys[modality]
        measured = self.resources.probes
        fingerprint = str(model.encoders[key].fingerprint)
        name = f"{modality} {fingerprint}"
        task = f"probe/{modality}"
        if reused := self.resources.reusable_metrics(task, f"encoders.{key}", fingerprint):
            measured[name] = reused[0]
        if name not in measured:  # a model and its baseline often share encoders
            start = time.perf_counter()
            pairs = [(item.concept, _medium_of(item)) for item in items]
            predicted = probe(model, modality, pairs, data=self.resources.data)
            correct = [a == concept for a, (concept, _) in zip(predicted, pairs, strict=True)]
            metric = accuracy_metric(task, correct, start)
            measured[name] = with_threshold(metric, tasks.PROBE_THRESHOLD)
        self.metrics.append(measured[name])

    def _measure_motion(self, responses: Sequence[EvalResponse]) -> None:
        """How many generated clips move."""
        start = time.perf_counter()
        moves = [motion(response.media[0]) >= tasks.LEAST_MOTION for response in responses]
        metric = accuracy_metric("decoder/video, moves", moves, start)
        self.metrics.append(with_threshold(metric, tasks.MOTION_THRESHOLD))

    def _measure_as_input(self, responses: Sequence[EvalResponse]) -> None:
        """Accuracy of naming the model's own images when the user shows them."""
        start = time.perf_counter()
        questions = self.resources.heldout_questions()
        items = []
        for number, response in enumerate(responses):
            drawn = [medium for message in response.messages[:-1] for medium in message.media]
            if drawn:
                turn = (user(drawn[0], questions[number % len(questions)]),)
                items.append(
                    replace(
                        response.item,
                        id=f"{response.item.id}/as input",
                        task="what-did-you-draw/as input",
                        turns=(turn,),
                    )
                )
        with captions_blocked(self.chat.model):
            shown = generate_responses(self.chat, items, render_media=False)
        labels = self.resources.visual_labels
        scored = [tasks.score_name(response, labels) for response in shown]
        self._add("what-did-you-draw/as input", scored, start)

    def _add_ratio(self, name: str, measured: perplexity.Perplexity, start: float) -> None:
        """Perplexity of the adapted model over that of the base model; n counts tokens."""
        logger.info("%s: %.3f, base %.3f", name, measured.adapted, measured.base)
        self.metrics.append(
            Metric(
                f"{name}, ratio",
                measured.tokens,
                measured.ratio,
                threshold=f"<= {tasks.MAX_PERPLEXITY_RATIO}",
                met=measured.ratio <= tasks.MAX_PERPLEXITY_RATIO,
                seconds=round(time.perf_counter() - start, 2),
            )
        )

    def _add_differences(self, agreement: batching.Agreement) -> None:
        """The largest difference of media by modality; no media miss the threshold."""
        for modality in self.chat.model.renderer.output_keys:
            differences = agreement.differences.get(modality, [])
            largest = max(differences, default=0.0)
            self.metrics.append(
                Metric(
                    f"batch of 8/float32, {modality} max difference",
                    len(differences),
                    largest,
                    threshold=f"<= {tasks.MEDIA_TOLERANCE:.0e}",
                    met=bool(differences) and largest <= tasks.MEDIA_TOLERANCE,
                )
            )


def _with_task_threshold(metric: Metric, task: Task, values: dict[str, float]) -> Metric:
    """The metric with its task's threshold; not compared if the metric that the threshold is a
    fraction of was not measured."""
    if task.threshold is None:
        return metric
    if task.relative_to is None:
        return with_threshold(metric, task.threshold)
    if task.relative_to in values:
        threshold = task.threshold * values[task.relative_to]
        return with_threshold(metric, threshold, f" ({task.threshold} x {task.relative_to})")
    return replace(metric, threshold=f"{task.threshold} x {task.relative_to}")


def _medium_of(item: EvalItem) -> Medium:
    """The one medium that the user shows."""
    return next(medium for message in item.turns[0] for medium in message.media)
