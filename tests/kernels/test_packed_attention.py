"""Packed attention against torch's, with a mask of T x T."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.kernels import pack_layout, packed_attention
from mmllm.kernels.pack_layout import PackLayout

LENGTHS = (4, 9, 1, 5, 9, 2)
CPU = torch.device("cpu")


def visible(prefix_len: int, window: int | None) -> Tensor:
    """bool[T, T]: the prefix before it and its own sequence up to itself."""
    owner = torch.tensor(
        [-1] * prefix_len + [n for n, size in enumerate(LENGTHS) for _ in range(size)]
    )
    position = torch.cat(
        [torch.arange(prefix_len), *(prefix_len + torch.arange(n) for n in LENGTHS)]
    )
    distance = position[:, None] - position
    mask = (distance >= 0) & ((owner[:, None] == owner) | (owner == -1))
    return mask if window is None else mask & (distance < window)


@pytest.mark.parametrize("overhead", [0, 10_000], ids=["many groups", "one group"])
@pytest.mark.parametrize("max_math_keys", [0, 256], ids=["fused", "math"])
@pytest.mark.parametrize(("prefix_len", "window"), [(0, None), (3, None), (0, 4), (3, 4)])
def test_packed_attention_and_its_gradients_are_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
    prefix_len: int,
    window: int | None,
    max_math_keys: int,
    overhead: int,
) -> None:
    monkeypatch.setattr(pack_layout, "GROUP_OVERHEAD", overhead)
    monkeypatch.setattr(packed_attention, "MAX_MATH_KEYS", max_math_keys)
    torch.manual_seed(0)
    total = prefix_len + sum(LENGTHS)
    states = [torch.randn(1, heads, total, 8, requires_grad=True) for heads in (6, 2, 2)]
    slope = torch.randn(1, total, 6, 8)
    layout = PackLayout.build(LENGTHS, prefix_len, CPU)
    assert len(layout.groups) == (len(LENGTHS) if overhead == 0 else 1) + (prefix_len > 0)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=True)
    options = {"scaling": 0.3, "sliding_window": window}
    output, _ = packed_attention.packed_sdpa_forward(
        module, *states, None, pack_layout=layout, **options
    )
    gradients = torch.autograd.grad((output * slope).sum(), states)
    expected = F.scaled_dot_product_attention(
        *states, attn_mask=visible(prefix_len, window), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    expected_gradients = torch.autograd.grad((expected * slope).sum(), states)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix_len", [0, 3])
def test_values_of_another_width_than_keys(prefix_len: int) -> None:
    """As in multi-head latent attention."""
    total = prefix_len + sum(LENGTHS)
    states = [torch.randn(1, 6, total, width, requires_grad=True) for width in (8, 8, 5)]
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=True)
    layout = PackLayout.build(LENGTHS, prefix_len, CPU)
    output, _ = packed_attention.packed_sdpa_forward(
        module, *states, None, pack_layout=layout, scaling=0.3
    )
    expected = F.scaled_dot_product_attention(
        *states, attn_mask=visible(prefix_len, None), scale=0.3
    )
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    gradients = [
        torch.autograd.grad(attended.square().sum(), states) for attended in (output, expected)
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_sequences_are_grouped_where_that_saves_padding() -> None:
    lengths = [30] * 20 + [300]
    layout = PackLayout.build(lengths, 10, CPU)
    output = [(group.prefix_len, group.num_sequences, group.num_queries) for group in layout.groups]
    assert output == [(0, 1, 12), (10, 1, 302), (10, 20, 30)]
    assert all(group.num_keys % pack_layout.LENGTH_MULTIPLE == 0 for group in layout.groups)
    for keys in (False, True):
        index = layout.row_index(3, keys=keys)
        values = torch.arange(3 * (10 + sum(lengths)))
        assert index.gather(index.scatter(values)).equal(values)
    assert pack_layout.group_sizes([300] + [30] * 20, 10, torch.device("cuda")) == [21]
