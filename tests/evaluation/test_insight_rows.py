"""Rows on attention heads, copying and steering: which media are paired, and what is compared with
what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mmllm import mini
from mmllm.conversation import Audio, Image, Medium
from mmllm.evaluation import heads as rows
from mmllm.evaluation import steering
from mmllm.inference.chat import Chat
from mmllm.insight import heads
from mmllm.model import AnyToAny
from tests.insight.studies import a_study


@pytest.mark.parametrize(
    ("shown", "asked", "least"),
    [("image", "image", 300), ("audio", "audio", 80), ("image", "audio", 30)],
)
def test_a_thing_is_asked_for_in_another_form_than_it_is_shown_in(
    shown: str, asked: str, least: int
) -> None:
    examples = rows.paired_examples(mini.locate("data"), shown, asked)
    assert len(examples) >= least
    assert len({example.name for example in examples}) == len(examples)
    for example in examples:
        for part, kind in ((example.shown, shown), (example.asked, asked)):
            assert isinstance(part, Image if kind == "image" else Audio)
            assert str(part.source).endswith((".webp", ".ogg"))
        assert str(example.shown.source) != str(example.asked.source)  # pyright: ignore
    words = rows.paired_examples(mini.locate("data"), "text", asked)
    assert all(isinstance(example.shown, str) for example in words)


def test_heads_are_compared_with_others_of_their_layers(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "NUM_HEADS", 1)
    done: list[int] = []
    metrics = list(rows.measure_heads(Chat(tiny_model), mini.locate("data"), 3, done.append))
    assert done == [3]
    loss, without, others, label, share = metrics
    assert loss.value == pytest.approx(heads.repeat_losses(tiny_model, 3).mean().item())
    top = heads.head_table(tiny_model).top(1)
    rise = heads.repeat_losses(tiny_model, 3, heads=top) - heads.repeat_losses(tiny_model, 3)
    assert without.value == pytest.approx(rise.mean().item(), abs=1e-4)
    assert without.met is False  # a random model copies nothing
    assert others.threshold == "<= 1.00"
    assert label.n == 288
    assert share.n == 12
    assert share.low is not None
    assert share.low <= share.value


def test_in_context_learning_is_the_loss_by_position(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "NUM_HEADS", 1)
    done: list[int] = []
    data = mini.locate("data")
    metrics = list(rows.measure_text_learning(Chat(tiny_model), data, 2, done.append))
    found = {metric.name.removeprefix("insight/heads/text, "): metric for metric in metrics}
    assert done == [2]
    ids = rows.text_windows(tiny_model, data, 2)
    assert ids.shape == (2, 512)
    assert not ids[0].equal(ids[1])
    losses = heads.token_losses(tiny_model, ids)  # the loss of the token at position p is at p - 1
    band = found["loss of text at positions 33 to 64"]
    assert band.value == pytest.approx(losses[:, 32:64].mean().item(), rel=1e-4)
    plain = found["in-context learning, loss at 500 less 50"]
    assert plain.value == pytest.approx((losses[:, 499] - losses[:, 49]).mean().item(), abs=1e-4)
    top = heads.head_table(tiny_model).top(1)
    note = f", without {top[0]}"
    with heads.ablated(tiny_model, top):
        ablated = heads.token_losses(tiny_model, ids)
    name = "in-context learning, loss at 401 to 511 less 33 to 64"
    expected = ablated[:, 400:511].mean() - ablated[:, 32:64].mean()
    assert found[name + note].value == pytest.approx(expected.item(), abs=1e-3)
    changes = [metric for metric in metrics if "change of in-context" in metric.name]
    assert len(changes) == 4
    assert changes[1].value == pytest.approx(found[name + note].value - found[name].value, abs=1e-4)
    assert {metric.name.rpartition(", ")[2] for metric in changes} == {
        note.removeprefix(", "),
        "without 1 others",
    }


class FixedJudge:
    """Names the same things, in the same order, whatever it sees."""

    concepts = ("dog", "cat", "mouse", "rabbit", "fox", "bear")

    def rank(self, media: Sequence[Medium]) -> list[list[str]]:
        assert all(medium.has_data for medium in media)
        return [list(self.concepts)] * len(media)


def test_media_are_steered_by_features_and_by_chance(
    tiny_model: AnyToAny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = a_study(tiny_model, tmp_path)
    monkeypatch.setattr(steering, "open_study", lambda _: study)
    monkeypatch.setattr(steering, "build_judge", lambda *_, **__: FixedJudge())
    monkeypatch.setattr(tiny_model.renderer, "output_keys", {"image": "image"})
    metrics = list(
        steering.measure_feature_steering(Chat(tiny_model), mini.locate("data"), 6, lambda _: None)
    )
    assert [(metric.name.rpartition(", image, ")[2], metric.value) for metric in metrics] == [
        ("SAE features, top 1", pytest.approx(1 / 6)),
        ("SAE features, top 5", pytest.approx(5 / 6)),
        ("random of their size, top 1", pytest.approx(1 / 6)),
        ("random of their size, top 5", pytest.approx(5 / 6)),
    ]
    assert [metric.met for metric in metrics] == [False, True, False, False]
    things = [("dog", "a dog"), ("cat", "a cat"), ("apple", "an apple")]
    directions = steering.feature_directions(
        Chat(tiny_model), study, "image", things, [*things[1:], things[0]]
    )
    vectors = torch.stack([direction.vector for direction in directions])
    assert vectors.shape == (3, 4, 32)
    assert vectors.norm() > 0
    torch.testing.assert_close(vectors.sum(0), torch.zeros(4, 32), atol=1e-4, rtol=0)
