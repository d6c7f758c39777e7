"""Which tasks are measured, and which metrics of a baseline are reused."""

import pytest

from mmllm.errors import ConfigError
from mmllm.evaluation import EvaluationReport, Metric, evaluate
from mmllm.evaluation.resources import EvaluationResources


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'text->smell'; known are image->text"):
        evaluate("mini", tasks=["text->smell"])


def test_metrics_of_an_unchanged_frozen_part_are_reused() -> None:
    metrics = tuple(
        Metric(name, 200, 0.9)
        for name in ("decoder/image", "decoder/image, top 1", "decoder/video", "text->image")
    )
    baseline = EvaluationReport("mini", metrics, facts={"fingerprints": {"decoders.image": "a"}})
    resources = EvaluationResources([], None, baseline=baseline)
    assert resources.reusable_metrics("decoder/image", "decoders.image", "a") == list(metrics[:2])
    assert resources.reusable_metrics("decoder/image", "decoders.image", "b") == []
    assert resources.reusable_metrics("decoder/video", "decoders.video", "a") == []
    sample = EvaluationResources([], 20, baseline=baseline)  # fewer items: another metric
    assert sample.reusable_metrics("decoder/image", "decoders.image", "a") == []
