"""Packed attention against the plain one with a mask of everything."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.kernels import pack_layout
from mmllm.kernels import packed_attention as packing
from mmllm.kernels.pack_layout import PackLayout

LENGTHS = (4, 9, 1, 5, 9, 2)
CPU = torch.device("cpu")


def visible(prefix_len: int, window: int | None) -> Tensor:
    """bool[T, T]: the prefix before it and its own sequence up to itself."""
    whose = torch.tensor(
        [-1] * prefix_len + [n for n, size in enumerate(LENGTHS) for _ in range(size)]
    )
    place = torch.cat([torch.arange(prefix_len), *(prefix_len + torch.arange(n) for n in LENGTHS)])
    behind = place[:, None] - place
    mask = (behind >= 0) & ((whose[:, None] == whose) | (whose == -1))
    return mask if window is None else mask & (behind < window)


@pytest.mark.parametrize("group", [0, 10_000], ids=["many groups", "one group"])
@pytest.mark.parametrize("short", [0, 256], ids=["fused", "plain"])
@pytest.mark.parametrize(("prefix_len", "window"), [(0, None), (3, None), (0, 4), (3, 4)])
def test_packed_attention_and_its_gradients_are_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, prefix_len: int, window: int | None, short: int, group: int
) -> None:
    monkeypatch.setattr(pack_layout, "GROUP_OVERHEAD", group)
    monkeypatch.setattr(packing, "MAX_MATH_KEYS", short)
    torch.manual_seed(0)
    total = prefix_len + sum(LENGTHS)
    states = [torch.randn(1, heads, total, 8, requires_grad=True) for heads in (6, 2, 2)]
    weigh = torch.randn(1, total, 6, 8)
    rows = PackLayout.build(LENGTHS, prefix_len, CPU)
    assert len(rows.groups) == (len(LENGTHS) if group == 0 else 1) + (prefix_len > 0)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=True)
    options = {"scaling": 0.3, "sliding_window": window}
    found, _ = packing.packed_sdpa_forward(module, *states, None, pack_layout=rows, **options)
    gradients = torch.autograd.grad((found * weigh).sum(), states)
    plain = F.scaled_dot_product_attention(
        *states, attn_mask=visible(prefix_len, window), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(
        gradients, torch.autograd.grad((plain * weigh).sum(), states), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix_len", [0, 3])
def test_values_of_another_width_than_keys(prefix_len: int) -> None:
    """As in multi-head latent attention."""
    total = prefix_len + sum(LENGTHS)
    states = [torch.randn(1, 6, total, width, requires_grad=True) for width in (8, 8, 5)]
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=True)
    rows = PackLayout.build(LENGTHS, prefix_len, CPU)
    found, _ = packing.packed_sdpa_forward(module, *states, None, pack_layout=rows, scaling=0.3)
    plain = F.scaled_dot_product_attention(*states, attn_mask=visible(prefix_len, None), scale=0.3)
    torch.testing.assert_close(found, plain.transpose(1, 2), atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(read.square().sum(), states) for read in (found, plain)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_groups_spare_padding_where_it_is_worth_a_call() -> None:
    lengths = [30] * 20 + [300]
    rows = PackLayout.build(lengths, 10, CPU)
    found = [(group.prefix_len, group.num_sequences, group.num_queries) for group in rows.groups]
    assert found == [(0, 1, 12), (10, 1, 302), (10, 20, 30)]
    assert all(group.num_keys % pack_layout.LENGTH_MULTIPLE == 0 for group in rows.groups)
    for keys in (False, True):
        places = rows.row_index(3, keys=keys)
        every = torch.arange(3 * (10 + sum(lengths)))
        assert places.gather(places.scatter(every)).equal(every)
    assert pack_layout.group_sizes([300] + [30] * 20, 10, torch.device("cuda")) == [21]
