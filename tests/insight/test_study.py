"""From data to a dictionary and its page, twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmllm.errors import CheckpointError, ConfigError
from mmllm.inference.chat import Chat
from mmllm.insight import study as studies
from mmllm.insight.features.gallery import write_features
from mmllm.insight.steering import late_site
from mmllm.insight.study import read_data
from mmllm.model import AnyToAny
from tests.insight.studies import a_study


def test_a_second_study_reads_what_the_first_one_made(
    tiny_model: AnyToAny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = a_study(tiny_model, tmp_path)
    assert study.site == late_site(tiny_model)
    page = write_features(study, tmp_path / "page.html", num=5)
    text = page.read_text(encoding="utf-8")
    assert text.count('<article class="feature"') == 5
    assert "with it" in text
    assert "48 features of tiny" in text
    scores = study.scores()
    assert list(scores) == ["dictionary", "PCA-4", "4 plain axes"]
    assert scores["dictionary"]["text"].value > scores["4 plain axes"]["text"].value
    assert "dead features" in study.summary()
    recovered = study.loss_recovered(3, {"copy": lambda states: states.float()})
    assert recovered["copy"].value == pytest.approx(1, abs=0.05)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(studies, "train_dictionary", refuse)
    again = a_study(tiny_model, tmp_path)
    assert again.summary() == study.summary()
    with pytest.raises(AssertionError, match="trained again"):
        again.frozen  # noqa: B018


def test_a_dictionary_of_another_model_is_refused(
    make_model: Callable[..., AnyToAny], tmp_path: Path
) -> None:
    own, other = make_model(), make_model(seed=1)
    dictionary = a_study(own, tmp_path).dictionary
    with pytest.raises(CheckpointError, match=f"but this model is {Chat(other).fingerprint}"):
        dictionary.check_origin(Chat(other).fingerprint, "layers.1")


def test_rows_that_cannot_be_used_are_counted(tiny_model: AnyToAny, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    rows = [good, {"messages": []}, good, {"messages": [{"role": "user", "content": "alone"}]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = read_data(tiny_model, str(file))
    assert (len(data.conversations), data.skipped) == (2, 2)
    assert len(read_data(tiny_model, str(file), limit=2).conversations) == 2
    file.write_text(json.dumps(rows[3]), encoding="utf-8")
    with pytest.raises(ConfigError, match="none of 1 rows can be used with this model"):
        read_data(tiny_model, str(file))
