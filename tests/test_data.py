"""Datasets: which conversation a row becomes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmllm import config
from mmllm.conversation import Message, Text
from mmllm.data.dialogues import DialoguesConfig
from mmllm.data.pairs import PairsConfig


def said(message: Message) -> list[str]:
    return [part.text if isinstance(part, Text) else part.modality for part in message.parts]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    row = {"file": "a.png", "modality": "image", "caption": "a red apple", "label": "apple"}
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    return str(tmp_path / "pairs.json")


@pytest.mark.parametrize(
    ("direction", "replies", "expected"),
    [
        ("understand", (), ["a red apple"]),
        ("understand", ("An {label}.",), ["An apple."]),
        ("generate", (), ["image"]),
        ("generate", ("Here is {caption}.",), ["Here is a red apple.", "image"]),
    ],
)
def test_pairs_reply_with_the_caption_the_medium_or_a_sentence(pairs, direction, replies, expected):
    source = config.build(
        PairsConfig(pairs, direction, ("{label}?",), "image", replies), where="data"
    )
    asked, answered = source.conversation(0, np.random.default_rng(0))
    assert said(answered) == expected
    assert "apple?" in said(asked)


def test_dialogues_put_text_and_medium_in_either_order_if_asked(tmp_path: Path):
    shown = [{"type": "image", "file": "a.png"}, {"type": "text", "text": "What is this?"}]
    drawn = [{"type": "text", "text": "Here."}, {"type": "image", "file": "a.png"}]
    row = {
        "messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": drawn}]
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    orders = {}
    for either in (False, True):
        source = config.build(
            DialoguesConfig(str(tmp_path / "rows.jsonl"), either_order=either), where="data"
        )
        talks = [source.conversation(0, np.random.default_rng(seed)) for seed in range(20)]
        orders[either] = {tuple(said(asked)) for asked, _ in talks}
        assert {tuple(said(answered)) for _, answered in talks} == {("Here.", "image")}
    assert orders[False] == {("image", "What is this?")}
    assert orders[True] == {("image", "What is this?"), ("What is this?", "image")}
