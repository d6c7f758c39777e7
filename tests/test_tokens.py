"""Ids of signal tokens and the placeholder, and the logits that begin a signal span."""

from __future__ import annotations

import pytest

from mmllm.tokens import TokenSpace

TOKENS = TokenSpace(100, {"image": 3, "audio": 2})


def test_ids_are_consecutive_and_the_placeholder_is_the_last() -> None:
    assert TOKENS.signal_ids("image") == [100, 101, 102]
    assert TOKENS.signal_ids("audio") == [103, 104]
    assert TOKENS.placeholder_id == 105
    assert TOKENS.num_signals == 5


def test_an_output_has_one_logit_and_finds_its_way_back() -> None:
    assert [TOKENS.logit_index(key) for key in TOKENS.outputs] == [100, 101]
    assert [TOKENS.output_of_logit(index) for index in (99, 100, 101)] == [None, "image", "audio"]


def test_only_the_first_id_of_a_span_names_its_output() -> None:
    names = [TOKENS.output_of_first_id(token) for token in range(99, 106)]
    assert names == [None, "image", None, None, "audio", None, None]


def test_rows_are_those_of_a_table_of_all_signal_tokens() -> None:
    table = list(range(5))
    assert [table[TOKENS.signal_rows(key)] for key in TOKENS.outputs] == [[0, 1, 2], [3, 4]]


def test_without_outputs_the_placeholder_follows_the_vocabulary() -> None:
    tokens = TokenSpace(7, {})
    assert (tokens.placeholder_id, tokens.outputs) == (7, [])
    with pytest.raises(KeyError):
        tokens.signal_ids("image")
