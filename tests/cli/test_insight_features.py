"""`mmllm insight features`: mistakes, and what it hands over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import mmllm
from mmllm.cli import main
from mmllm.cli.entry import FAILED
from mmllm.insight import study as studies
from mmllm.insight.features import changes, gallery


def test_sizes_have_to_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["insight", "features", "--steps", "0"]) == FAILED
    assert "steps" in capsys.readouterr().err


def test_options_become_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: dict = {}

    class Study:
        def __init__(self, *_: object, **options: object) -> None:
            made.update(options)
            self.dictionary = self.base_activations = self.activations = "states"

        def summary(self, **options: object) -> str:
            return f"scores {options}"

    def write(study: object, page: Path, **options: object) -> Path:
        made.update(options)
        return page

    def load(name: str, *, trust: object) -> SimpleNamespace:
        made["trust"] = trust
        return SimpleNamespace(model=None, fingerprint="m")

    change = changes.FeatureChange(7, {"text": (0.01, 0.2)}, {"text": (0.1, 1.0)})
    monkeypatch.setattr(changes, "feature_changes", lambda *_: [change])
    monkeypatch.setattr(mmllm, "load", load)
    monkeypatch.setattr(studies, "DictionaryStudy", Study)
    monkeypatch.setattr(studies, "read_data", lambda model, file, limit: (file, limit))
    monkeypatch.setattr(gallery, "write_features", write)
    arguments = ["--kind", "topk", "--width", "64", "--k", "3", "--site", "layers.2"]
    arguments += ["--shown", "5", "--baselines", "--folder", str(tmp_path)]
    assert main(["insight", "features", "mini", *arguments]) == 0
    assert (made["config"].kind, made["config"].width, made["config"].k) == ("topk", 64, 3)
    assert (made["site"], made["num"], made["with_frozen"]) == ("layers.2", 5, True)
    shown = capsys.readouterr().out
    assert "scores" in shown
    assert str(tmp_path / "features.html") in shown
    assert (made["changes"], made["trust"]) == ([], ())
    options = ["--against", "base", "--trust", "own.module", "--folder", str(tmp_path)]
    assert main(["insight", "features", "mini", *options]) == 0
    assert (made["changes"], made["trust"]) == ([change], ["own.module"])
    assert "feature 7: active at text 1.0% -> 20.0%" in capsys.readouterr().out
