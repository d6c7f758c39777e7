"""Rows on attention heads and copying: which media are paired, and what is compared with what."""

from __future__ import annotations

import pytest

from mmllm import mini
from mmllm.conversation import Audio, Image
from mmllm.evaluation import heads as rows
from mmllm.inference.chat import Chat
from mmllm.insight import heads
from mmllm.model import AnyToAny


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
