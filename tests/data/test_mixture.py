"""Datasets: which conversation a row becomes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmllm import config
from mmllm.conversation import Message, Text
from mmllm.data.formats.dialogues import DialoguesConfig
from mmllm.data.formats.pairs import PairsConfig
from mmllm.data.mixture import Draw, LengthGroups, Mixture, balance_by_length


def contents(message: Message) -> list[str]:
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
    assert contents(answered) == expected
    assert "apple?" in contents(asked)


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
        orders[either] = {tuple(contents(asked)) for asked, _ in talks}
        assert {tuple(contents(answered)) for _, answered in talks} == {("Here.", "image")}
    assert orders[False] == {("image", "What is this?")}
    assert orders[True] == {("image", "What is this?"), ("What is this?", "image")}


class Sized:
    """A source of which only lengths are known."""

    def __init__(self, lengths: list[int], share: float):
        self.lengths, self.share = lengths, share

    def __len__(self) -> int:
        return len(self.lengths)


def test_groups_of_like_length_hold_what_was_drawn_and_pad_little():
    rng = np.random.default_rng(0)
    sources = {
        "short": Sized(rng.integers(5, 40, 70).tolist(), 1.0),
        "long": Sized(rng.integers(30, 200, 50).tolist(), 2.0),
    }

    def length(draw: Draw) -> int:
        return sources[draw.source].lengths[draw.index]

    def padding(order: Mixture | LengthGroups) -> float:
        """Padded positions per real position, in micro-batches of four."""
        parts = [
            [length(draw) for draw in order.batch(step, 8)[start : start + 4]]
            for step in range(20)
            for start in (0, 4)
        ]
        return sum(max(part) * len(part) for part in parts) / sum(map(sum, parts)) - 1

    mixture = Mixture(sources, seed=5)  # pyright: ignore[reportArgumentType]
    groups = LengthGroups(mixture, length, window=10, slices=2)
    for first in (0, 10):  # each window holds the draws of its steps, and no other
        steps = range(first, first + 10)
        drawn = {draw for step in steps for draw in mixture.batch(step, 8)}
        assert {draw for step in steps for draw in groups.batch(step, 8)} == drawn
    assert padding(groups) < 0.1 < 0.4 < padding(mixture)
    # A step is of several lengths: its two slices are not neighbours in the sorted window.
    gaps = [
        abs(np.median([*map(length, batch[:4])]) - np.median([*map(length, batch[4:])]))
        for batch in (groups.batch(step, 8) for step in range(20))
    ]
    assert np.mean(gaps) > 20
    # Asked for out of order, by one who has not seen the steps before.
    again = LengthGroups(Mixture(sources, seed=5), length, window=10, slices=2)  # pyright: ignore
    assert again.batch(17, 8) == groups.batch(17, 8)
    other = LengthGroups(Mixture(sources, seed=6), length, window=10, slices=2)  # pyright: ignore
    assert other.batch(17, 8) != groups.batch(17, 8)


def test_draws_are_dealt_evenly():
    rng = np.random.default_rng(0)
    for parts in (1, 2, 3, 8):
        lengths = rng.lognormal(4, 0.6, 8 * parts).astype(int).tolist()
        draws = [Draw("talks", index, seed=index) for index in range(len(lengths))]

        def tokens(part: list[Draw], lengths: list[int] = lengths) -> int:
            return sum(lengths[draw.index] for draw in part)

        dealt = balance_by_length(draws, parts, lambda draw, lengths=lengths: lengths[draw.index])
        assert [len(part) for part in dealt] == [8] * parts
        assert sorted(draw.index for part in dealt for draw in part) == [*range(len(draws))]
        slices = [draws[start : start + 8] for start in range(0, len(draws), 8)]
        spread = [np.ptp([*map(tokens, shared)]) for shared in (dealt, slices)]
        assert spread[0] <= min(spread[1], 0.05 * sum(lengths) / parts)


def test_equal_lengths_keep_their_order_and_each_length_is_computed_once():
    draws = [Draw("talks", index, seed=index) for index in range(6)]
    asked = []
    dealt = balance_by_length(draws, 3, lambda draw: asked.append(draw) or 7)
    assert [[draw.index for draw in part] for part in dealt] == [[0, 3], [1, 4], [2, 5]]
    assert asked == draws
    # The part with the longest conversation gets those that do not fit into the other.
    one = balance_by_length(draws[:4], 2, lambda draw: [9, 1, 1, 1][draw.index])
    assert [[draw.index for draw in part] for part in one] == [[0, 3], [1, 2]]
