"""The rows of `--tasks reasoning`, with scripted models whose results are known."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mmllm import mini
from mmllm.errors import ConfigError
from mmllm.evaluation import evaluate
from mmllm.evaluation.metrics import Metric
from mmllm.evaluation.reasoning import ROWS
from mmllm.evaluation.reasoning.searching import sample_sentences
from mmllm.evaluation.tasks import TASKS
from mmllm.reasoning import ScriptedModel
from tests.reasoning.optimizers import descend

DATA = mini.locate("data")


def measured(name: str, model: ScriptedModel, num: int) -> dict[str, Metric]:
    done: list[int] = []
    metrics = {
        metric.name.removeprefix(f"{name}, "): metric
        for metric in ROWS[name][0](model, DATA, num, done.append)
    }
    assert sum(done) == num
    return metrics


def test_ciphers_are_counted_by_shift() -> None:
    def letters(_: str, reply: str) -> float:
        return sum(letter in "etaoin shr" for letter in reply)

    found = measured("reasoning/cipher", ScriptedModel(lambda *_: "No.", letters), 50)
    direct = found["asked directly"]
    assert (direct.n, direct.value, direct.met) == (44, 0, True)
    assert found["asked directly, shifts 1, 3, 13"].n == 6
    tested = found["generate and test"]
    assert (tested.n, tested.met) == (50, tested.value >= 0.95)
    assert tested.value > 0.6


def test_no_wrong_plan_comes_out_of_a_model_that_writes_wrong_ones() -> None:
    model = ScriptedModel(lambda *_: "[PLAN] stack A on B [END]")
    found = measured("reasoning/blocksworld", model, 6)
    assert found["wrong plans that came out"].met
    assert found["solved with a verifier"].value == 0
    assert found["solved by random plans"].value > 0
    assert len(model.conversations) == 6 * 2


def test_the_optimizer_stands_between_its_baselines() -> None:
    found = measured("reasoning/optimizer", ScriptedModel(descend), 5)
    assert found["optimum found by the model"].value == 1
    assert found["valid answers"].value == 1
    assert found["optimum found by random search"].value < 1


def test_sentences_are_those_of_the_text() -> None:
    text = (Path(DATA) / "text" / "alice.txt").read_text(encoding="utf-8")
    sentences = sample_sentences(text, 100)
    assert len(set(sentences)) == 100
    assert all(22 <= len(sentence) <= 40 for sentence in sentences)
    assert all(sentence in " ".join(text.split()) for sentence in random.sample(sentences, 10))
    assert sentences == sample_sentences(text, 100)


def test_an_unknown_row_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="reasoning/cipher"):
        evaluate("mini", tasks=["reasonning"])
    assert not any(task.name.startswith("reasoning") for task in TASKS)
