"""The rows of dictionaries, on a tiny model and on features that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmllm import mini
from mmllm.evaluation import dictionaries
from mmllm.evaluation.concept_exemplars import read_exemplars
from mmllm.inference.chat import Chat
from mmllm.insight.dictionary.synthetic import KnownFeatures
from mmllm.insight.dictionary.training import DictionaryConfig
from mmllm.model import AnyToAny
from tests.insight.studies import a_study

DATA = mini.locate("data")
TRUTH = KnownFeatures.draw(24, 16, active=1.5)
FAST = DictionaryConfig(width=32, k=2, steps=100, batch_size=64, learning_rate=5e-3)


@pytest.fixture
def chat(tiny_model: AnyToAny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    study = a_study(tiny_model, tmp_path)
    monkeypatch.setattr(dictionaries, "open_study", lambda _: study)
    monkeypatch.setattr(dictionaries, "TRUTH", TRUTH)
    monkeypatch.setattr(dictionaries, "SYNTHETIC", FAST)
    return Chat(tiny_model)


def test_a_dictionary_is_measured_next_to_its_baselines(chat: Chat) -> None:
    done: list[int] = []
    measured = dictionaries.measure_dictionary(chat, DATA, 4, done.append)
    found = {metric.name.removeprefix("insight/sae"): metric for metric in measured}
    assert done == [4]
    for name in ("", "/PCA-4", "/4 plain axes", "/random decoder"):
        assert found[f"{name}, variance explained of text"].value <= 1
        assert found[f"{name}, loss recovered"].n <= 4
    own = found[", variance explained of text"]
    assert own.threshold == "0.800"
    assert own.low is not None
    assert own.low <= own.value
    assert found["/random decoder, variance explained of text"].met is None
    lead = found[", least lead over baselines"].value
    best = max(
        found[f"{n}, variance explained of text"].value for n in ("/PCA-4", "/random decoder")
    )
    assert lead <= own.value - best
    active = found[", active features of text"]
    assert active.met
    assert active.value == pytest.approx(4, rel=0.05)
    assert found["/one threshold, active features of text"].met is None
    assert found["/one threshold, variance explained of text"].value <= 1


def test_more_known_features_are_found_than_by_chance() -> None:
    config = replace(FAST, steps=300)
    own, chance, explained = dictionaries.measure_known_features(TRUTH, config)
    assert own.n == chance.n == 24
    assert own.value > chance.value + 0.3
    assert explained.value > 0.5


def test_things_are_seen_audible_and_written(chat: Chat) -> None:
    shown = read_exemplars(chat.model, DATA, 2)
    kinds = {(each.exemplar.modality, each.exemplar.held_out) for each in shown}
    assert kinds == {
        (m, held_out) for m in ("image", "audio", "text") for held_out in (True, False)
    }
    assert {each.exemplar.concept for each in shown} == {"piano", "bell"}
    for each in shown:
        assert len(each.positions) <= {"image": 4, "audio": 2, "text": 12}[each.exemplar.modality]
        assert max(each.positions) < len(each.conversation)
    measured = dictionaries.measure_concepts(chat, DATA, 2, lambda _: None)
    found = {metric.name.removeprefix("insight/concepts"): metric for metric in measured}
    for name in ("", "/plain axes", "/random decoder", "/fitted directions"):
        areas = [found[f"{name}, AUROC of {m}"].value for m in ("image", "audio", "text")]
        assert found[f"{name}, worst of three AUROC"].value <= min(areas) + 1e-9
    lead = found[", lead over plain axes"]
    assert lead.value == pytest.approx(
        found[", worst of three AUROC"].value - found["/plain axes, worst of three AUROC"].value
    )
