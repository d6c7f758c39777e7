"""Memory: what is read of a long cache, against attention written the slow way, and against a cache
of which all is read."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.errors import ConfigError
from mmllm.llm.language_model import LanguageModel
from mmllm.llm.memory import MemoryOptions
from mmllm.llm.retrieval import NUM_SINKS, BlockTable, RetrievalLayer
from tests.llm.helpers import adapted, with_outputs

HEADS, KV_HEADS, WIDTH = 4, 2, 8
INV_FREQ = 1.0 / 100.0 ** (torch.arange(0, WIDTH, 2) / WIDTH)
SMALL = {"window": 16, "block": 8, "blocks": 3}


def rotated(states: Tensor, positions: Tensor) -> Tensor:
    """RoPE by complex numbers: float[..., T, E], int[..., T]"""
    first, second = states.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(
        torch.ones(()).double(), positions[..., None].double() * INV_FREQ.double()
    )
    return torch.cat([turned.real, turned.imag], dim=-1)


def slow_attention(q: Tensor, k: Tensor, v: Tensor, blocks: list[tuple[int, int]]) -> Tensor:
    """Attention of the last position as the docstring says it: keys and queries without positions,
    float[H, E], float[K, T, E] twice -> float[H, E]"""
    length, out = k.shape[1], []
    for head in range(KV_HEADS):
        queries = q[head * 2 : head * 2 + 2].double()
        means = torch.stack([k[head, a:b].double().mean(0) for a, b in blocks])
        scores = (queries @ means.T).amax(0)
        best = sorted(scores.argsort(descending=True)[: SMALL["blocks"]].tolist())
        read = list(range(NUM_SINKS))
        for number in best:
            read += range(*blocks[number])
        read += range(blocks[-1][1], length)
        near = torch.arange(len(read))
        keys = rotated(k[head, read], near)
        weights = rotated(queries, near[-1:].expand(2)) @ keys.T / WIDTH**0.5
        out.append(weights.softmax(-1) @ v[head, read].double())
    return torch.cat(out)


@pytest.mark.parametrize("media", [[], [(2, 5), (30, 61), (66, 70)]], ids=["text", "media"])
def test_a_position_reads_sinks_window_and_the_blocks_that_fit_it_best(media: list) -> None:
    length = 121
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(HEADS, WIDTH, generator=generator)
    k, v = torch.randn(2, KV_HEADS, length, WIDTH, generator=generator)
    layer = RetrievalLayer(BlockTable(MemoryOptions(**SMALL), INV_FREQ, media))
    positions = torch.arange(length)
    layer.update(rotated(k, positions).float()[None], v[None])
    query = rotated(q, positions[-1:].expand(HEADS)).float()[None, :, None]
    keys, values, mask = layer.retrieve(query)
    found = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, enable_gqa=True
    )
    table = layer.table.before_window(length)
    assert table is not None
    ends = (table.starts + table.lengths).tolist()
    blocks = list(zip(table.starts.tolist(), ends, strict=True))
    if not media:
        assert blocks == [(start, start + 8) for start in range(4, 100, 8)]
        wanted = slow_attention(q, k, v, blocks)
        torch.testing.assert_close(found[0, :, 0].double(), wanted, atol=1e-5, rtol=1e-5)
        assert keys.shape[2] < length / 2
    else:
        for start, end in media:
            cut = [edge for edge in (blocks[0][0], *ends) if start < edge < end]
            assert cut == [], "a medium is never cut"
        assert (30, 61) in blocks
    assert blocks[-1][1] <= length - SMALL["window"]
    assert [end for _, end in blocks[:-1]] == [start for start, _ in blocks[1:]]


def test_blocks_of_unequal_length_are_masked() -> None:
    """With all blocks read, blocks of any length give what plain attention gives."""
    length = 90
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, HEADS, 3, WIDTH, generator=generator)
    k, v = torch.randn(2, 1, KV_HEADS, length, WIDTH, generator=generator)
    options = MemoryOptions(window=16, block=8, blocks=100)
    layer = RetrievalLayer(BlockTable(options, INV_FREQ, [(9, 40), (44, 47)]))
    layer.update(k, v)
    keys, values, mask = layer.retrieve(q)
    assert mask is not None
    assert keys.shape[2] > length
    causal = torch.ones(3, length, dtype=torch.bool).tril(length - 3)
    attend = torch.nn.functional.scaled_dot_product_attention
    found = attend(q, keys, values, attn_mask=mask, enable_gqa=True)
    wanted = attend(q, k, v, attn_mask=causal, enable_gqa=True)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def read_in_steps(llm: LanguageModel, ids: Tensor, num_prompt: int) -> Tensor:
    """Hidden states float[T, D] of a prompt and of what follows, token by token."""
    cache, embeds = llm.new_cache(), llm.embed(ids[None])
    positions = torch.arange(len(ids))[None]
    cuts = [0, num_prompt, *range(num_prompt + 1, len(ids) + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    states = [llm(embeds[:, p], positions=positions[:, p], cache=cache)[0] for p in parts]
    return torch.cat(states)


def tokens(llm: LanguageModel, num: int) -> Tensor:
    return torch.randint(300, (num,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("path", ["auto", "reference", "hooked"])
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_with_all_blocks_read_it_is_the_plain_cache(name: str, path: Any, folders: Any) -> None:
    plain, memory = (
        adapted(with_outputs(folders(name), memory=options))
        for options in (None, {**SMALL, "blocks": 1000})
    )
    for llm in (plain, memory):
        llm.use_kernels("reference" if path == "reference" else "auto")
    if path == "hooked":
        memory.backbone.layers[0].mlp.register_forward_hook(lambda *_: None)
    ids = tokens(plain, 170)
    torch.testing.assert_close(
        read_in_steps(memory, ids, 150), read_in_steps(plain, ids, 150), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("path", ["reference", "hooked"])
def test_transformers_layers_read_the_same_blocks(path: Any, folders: Any) -> None:
    fast, other = (adapted(with_outputs(folders("llama3"), memory=SMALL)) for _ in range(2))
    if path == "reference":
        other.use_kernels("reference")
    else:
        other.backbone.layers[0].mlp.register_forward_hook(lambda *_: None)
    ids = tokens(fast, 320)
    found, wanted = (read_in_steps(llm, ids, 300) for llm in (fast, other))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    everything = read_in_steps(adapted(with_outputs(folders("llama3"))), ids, 300)
    assert (found[-1] - everything[-1]).abs().max() > 1e-3, "blocks are left out"


@torch.no_grad()
def test_what_is_read_does_not_grow_with_the_text(folders: Any) -> None:
    llm = with_outputs(folders("llama3"), memory=SMALL)
    sizes = set()
    for length in (60, 200, 700):
        cache = llm.new_cache()
        llm(llm.embed(tokens(llm, length)[None]), positions=torch.arange(length)[None], cache=cache)
        layer: Any = cache.layers[0]
        keys, _, _ = layer.retrieve(torch.zeros(1, 4, 1, layer.keys.shape[-1]))
        sizes.add(keys.shape[2])
    assert max(sizes) <= NUM_SINKS + 3 * 8 + 16 + 8
    assert llm.max_length > 700 > llm.base_model.config.max_position_embeddings


@torch.no_grad()
def test_a_cache_that_was_cut_goes_on_as_the_whole_one_did(folders: Any) -> None:
    llm = adapted(with_outputs(folders("llama3"), memory=SMALL))
    ids, positions = tokens(llm, 130), torch.arange(130)[None]
    embeds = llm.embed(ids[None])
    cache = llm.new_cache()
    llm(embeds[:, :100], positions=positions[:, :100], cache=cache)
    cut = cache.prefix(100)
    wanted = llm(embeds[:, 100:], positions=positions[:, 100:], cache=cache)
    for other in (cut, cache.prefix(100), cache.select_row(0, torch.arange(130) < 100)):
        found = llm(embeds[:, 100:], positions=positions[:, 100:], cache=other)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    shorter = cache.prefix(50)
    found = llm(embeds[:, 100:], positions=positions[:, 50:80], cache=shorter)
    fresh = llm.new_cache()
    llm(embeds[:, :50], positions=positions[:, :50], cache=fresh)
    wanted = llm(embeds[:, 100:], positions=positions[:, 50:80], cache=fresh)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3", {"memory": {"window": 0}}, "llm.memory.window: expected at least 1, got 0"),
        ("llama3", {"memory": {"blok": 1}}, "unknown key 'blok'; did you mean 'block'"),
        ("llama3", {"memory": SMALL, "attention": "eager"}, "needs llm.attention sdpa, got eager"),
        ("gemma3", {"memory": SMALL}, "expected a model of llama, mistral"),
        ("mistral", {"memory": SMALL}, "sliding windows forget older positions"),
    ],
)
def test_unsupported_uses_of_memory_are_refused(
    name: str, changes: dict, message: str, folders: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_outputs(folders(name), **changes)
