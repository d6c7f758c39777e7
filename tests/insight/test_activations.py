"""Batches by kind, splits by conversation, massive states left out."""

from __future__ import annotations

import pytest
import torch

from mmllm.errors import ConfigError
from mmllm.insight.activations import KINDS, norm_limit
from tests.insight.tables import table


def test_a_batch_has_the_shares_of_its_kinds_and_is_a_function_of_the_step() -> None:
    acts = table()
    sample = acts.sampler(100, balance={"text": 0.5, "image": 0.3, "signal": 0.2})
    states, targets = sample(3)
    assert states is targets
    kinds = (states[:, 0].float().round().long()) % 5
    assert len(states) == 100
    assert torch.equal(
        states, acts.sampler(100, balance={"text": 5, "image": 3, "signal": 2})(3)[0]
    )
    assert not torch.equal(states, sample(4)[0])
    assert states.float().norm(dim=1).max() <= 300
    exact = table(200).sampler(100, balance={"text": 0.5, "image": 0.3, "signal": 0.2})(0)[0]
    counts = torch.bincount(exact[:, 0].long() % 5, minlength=5)
    assert counts.tolist() == [50, 30, 0, 0, 20]
    assert kinds.max() <= 4


def test_targets_are_of_the_same_positions() -> None:
    acts = table()
    states, targets = acts.sampler(64, target=acts)(0)
    assert torch.equal(states, targets)


def test_held_out_conversations_are_whole_and_about_a_tenth() -> None:
    train, held_out = table().split()
    assert len(train) + len(held_out) == 400
    assert not set(train.items.tolist()) & set(held_out.items.tolist())
    assert 10 <= len(held_out) <= 80
    assert torch.equal(table().split()[1].tokens, held_out.tokens)


def test_massive_states_are_those_far_above_the_median() -> None:
    states = torch.ones(100, 4)
    states[7] *= 100
    assert norm_limit(states) == 20
    acts = table()
    assert torch.equal(acts.is_massive, acts.states.float().norm(dim=1) > 300)


@pytest.mark.parametrize(
    ("balance", "message"),
    [({"smell": 1}, "unknown kind 'smell'; known are text, image"), ({"text": 0}, "no positions")],
)
def test_a_wrong_balance_is_refused(balance: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table().sampler(8, balance=balance)


def test_kinds_are_counted() -> None:
    assert table().counts() == dict.fromkeys(KINDS, 80)
