"""The table, and JSON that comes back as it was."""

import json
from pathlib import Path

import mmllm
from mmllm.evaluation.metrics import Metric
from mmllm.evaluation.report import EvaluationReport


def _report() -> EvaluationReport:
    baseline = EvaluationReport("other", (Metric("text->image", 4, 0.25, 0.05, 0.7),))
    metrics = (
        Metric("text->image", 4, 0.5, 0.15, 0.85, "0.600", False, 1.5),
        Metric("batch of 8, image max difference", 8, 2e-6, threshold="<= 1e-04", met=True),
        Metric("video->text", 4, 1.0, 0.51, 1.0),
    )
    items = ({"id": "a/0", "correct": True, "prediction": {"text": "ein Löwe", "named": ["lion"]}},)
    return EvaluationReport("mini", metrics, items, {"versions": {"torch": "2"}}, baseline)


def test_json_round_trip(tmp_path: Path) -> None:
    report = _report()
    assert EvaluationReport.load(report.save(tmp_path / "new" / "report.json")) == report


def test_an_earlier_report_is_still_read(tmp_path: Path) -> None:
    former = {
        "model": "mini",
        "figures": [
            {"row": "batch of 8/float32, image apart", "n": 4, "value": 0.0, "bar": "<= 1"}
        ],
        "items": [{"id": "a", "row": "image->text", "right": True}],
        "facts": {},
        "beside": {"model": "x", "figures": [], "items": [], "facts": {}, "beside": None},
    }
    file = tmp_path / "report.json"
    file.write_text(json.dumps(former))
    report = EvaluationReport.load(file)
    name = "batch of 8/float32, image max difference"
    assert report.metrics == (Metric(name, 4, 0.0, threshold="<= 1"),)
    assert report.items == ({"id": "a", "task": "image->text", "correct": True},)
    assert report.baseline == EvaluationReport("x", ())


def test_the_shipped_report_is_read() -> None:
    report = EvaluationReport.load(Path(mmllm.__file__).parent / "mini" / "evaluation.json")
    assert report.metric("text->image") is not None
    assert {metric.name for metric in report.metrics} >= {"routing", "perplexity, ratio"}


def test_table_shows_thresholds_and_the_baseline() -> None:
    head, _, first, second, third = _report().table().splitlines()
    assert head.split() == ["metric", "n", "value", "95", "%", "threshold", "met", "other"]
    assert first.split() == ["text->image", "4", "0.500", "0.150-0.850", "0.600", "NO", "0.250"]
    assert second.split()[-4:] == ["2.0e-06", "<=", "1e-04", "yes"]
    assert third.split() == ["video->text", "4", "1.000", "0.510-1.000"]


def test_the_summary_is_a_line_for_each_ability_and_what_was_missed() -> None:
    head, _, draws, verdict, more = _report().summary(short_run=True).splitlines()
    assert head.split() == ["task", "yours", "other", "threshold"]
    assert draws.split() == ["draws", "text->image", "0.500", "0.250", "0.600"]
    assert verdict.startswith("1 of 2 thresholds are missed, as expected after minutes of training")
    assert verdict.endswith(": text->image.")
    assert more == "--all prints every metric."
    assert "expected" not in _report().summary()


def test_a_model_alone_that_misses_nothing() -> None:
    report = EvaluationReport("mini", (Metric("text->audio", 4, 0.9, 0.5, 1.0, "0.500", True),))
    head, _, sounds, verdict, _ = report.summary(short_run=True).splitlines()
    assert head.split() == ["task", "mini", "threshold"]
    assert sounds.split() == ["sounds", "text->audio", "0.900", "0.500"]
    assert verdict == "All 1 thresholds are met."


def test_the_baseline_that_is_shipped_is_called_so() -> None:
    shipped = EvaluationReport.load(Path(mmllm.__file__).parent / "mini" / "evaluation.json")
    report = EvaluationReport("runs/mini", _report().metrics, baseline=shipped)
    assert report.table().splitlines()[0].endswith("  shipped mini")
    assert "shipped mini" in report.summary().splitlines()[0]


def test_met_is_false_as_soon_as_one_threshold_is_missed() -> None:
    report = _report()
    assert not report.met
    assert EvaluationReport("mini", report.metrics[1:]).met
