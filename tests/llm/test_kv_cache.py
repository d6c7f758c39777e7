"""The key-value cache against transformers' own, position by position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig

from mmllm.llm.kv_cache import KVCache

CONFIG = LlamaConfig(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)


def states(rows: int, positions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values, float[B, 1, T, 4]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 1, positions, 4, generator=generator)
    return keys, values


def filled(cache: DynamicCache, rows: int, steps: tuple[int, ...], seed: int = 0) -> DynamicCache:
    for number, width in enumerate(steps):
        for layer in range(2):
            cache.update(*states(rows, width, seed + 10 * number + layer), layer)
    return cache


def contents(cache: DynamicCache) -> list[Tensor]:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]  # pyright: ignore


def assert_equal(cache: DynamicCache, expected: list[Tensor]) -> None:
    for part, wanted in zip(contents(cache), expected, strict=True):
        assert part.equal(wanted)


@pytest.mark.parametrize("steps", [(5,), (3, 1, 1), (1,) * 70, (40, 90, 1)])
def test_it_holds_what_transformers_cache_holds(steps: tuple[int, ...]) -> None:
    own = filled(KVCache(CONFIG), 2, steps)
    assert_equal(own, contents(filled(DynamicCache(config=CONFIG), 2, steps)))


def test_cropped_positions_are_written_again() -> None:
    own = filled(KVCache(CONFIG), 2, (5, 1, 1))
    own.crop(-2)
    assert own.get_seq_length() == 5
    assert_equal(own, contents(filled(DynamicCache(config=CONFIG), 2, (5,))))
    keys, values = states(2, 1, 77)
    assert own.update(keys, values, 0)[0][:, :, -1:].equal(keys)


def test_a_prefix_is_not_written_to_by_its_source_or_its_copies() -> None:
    own = filled(KVCache(CONFIG), 1, (6,))
    before = [part.clone() for part in contents(own)]
    prefix = own.prefix(4)
    assert_equal(prefix, [part[..., :4, :] for part in before])
    filled(prefix, 1, (3,), seed=50)
    assert_equal(own, before)
    again = own.prefix(4)
    assert_equal(again, [part[..., :4, :] for part in before])


def test_rows_are_selected_and_concatenated_behind_zeros() -> None:
    own, other = filled(KVCache(CONFIG), 3, (6,)), filled(KVCache(CONFIG), 1, (4,), seed=30)
    first, second = contents(own), contents(other)
    wanted = [
        torch.cat([a[[2, 0]][:, :, 1:], torch.cat([torch.zeros(1, 1, 1, 4), b], dim=2)])
        for a, b in zip(first, second, strict=True)
    ]
    own.select_rows([2, 0], start=1)
    own.concat(other)
    assert_equal(own, wanted)


def test_one_row_is_copied_without_its_padding() -> None:
    own = filled(KVCache(CONFIG), 2, (4,))
    real = torch.tensor([False, True, True, True])
    assert_equal(own.select_row(1, real), [part[1:, :, 1:] for part in contents(own)])


def test_a_sliding_window_cache_is_not_croppable() -> None:
    assert KVCache(CONFIG).croppable

    assert not KVCache(MistralConfig(num_hidden_layers=2, sliding_window=4)).croppable
