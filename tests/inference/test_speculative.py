"""Draft tokens copied from earlier text: where they come from, and that they change no reply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmllm.conversation import Conversation
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import generate
from mmllm.inference.outputs import GenerationOutput, SignalSpan
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.sampling import Sampling
from mmllm.inference.speculative import PromptLookupDraft
from mmllm.model import AnyToAny
from tests.inference.prompts import PROMPTS


def test_what_followed_the_same_tokens_is_proposed() -> None:
    lookup = PromptLookupDraft()
    lookup.extend([1, 2, 3, 4, 5, 9, 2, 3])
    assert lookup.propose(1) == [4]
    assert lookup.propose(9) == [4, 5]


def test_the_longest_match_and_then_the_latest_is_copied() -> None:
    lookup = PromptLookupDraft()
    lookup.extend([1, 2, 3, 7, 2, 3, 8, 2, 3, 9, 1, 2, 3])
    assert lookup.propose(1) == [7]  # behind 1 2 3, and not behind the later 2 3
    lookup.extend([0, 5, 2, 3])
    assert lookup.propose(1) == [0]


def test_drafts_grow_while_they_are_right_and_shrink_after_a_wrong_one() -> None:
    lookup = PromptLookupDraft()
    lookup.extend([7, 1, 2, 3, 1, 2, 3])
    assert lookup.propose(8) == [1, 2]
    lookup.extend([1, 2, 3])
    assert lookup.propose(8) == [1, 2, 3, 1, 2, 3, 1, 2], "a loop is continued"
    lookup.extend([1, 2, 9])
    assert lookup.propose(8) == [], "nothing has followed 2 9"
    lookup.extend([1, 2])
    assert lookup.propose(8) == [9, 1]


def test_nothing_is_proposed_without_a_match() -> None:
    lookup = PromptLookupDraft()
    assert lookup.propose(5) == []
    lookup.extend([1, 2, 3, 4])
    assert lookup.propose(5) == []


def counted(model: AnyToAny) -> list[int]:
    """The number of positions that each forward pass of the LLM reads, from now on."""
    widths: list[int] = []
    forward = model.llm.forward

    def noted(embeds: torch.Tensor, **options: Any) -> torch.Tensor:
        widths.append(embeds.shape[1])
        return forward(embeds, **options)

    model.llm.forward = noted
    return widths


def answer(
    model: AnyToAny,
    prompt: Conversation,
    prefixes: PrefixCache | None = None,
    **options: Any,
) -> GenerationOutput:
    return generate(
        model,
        [model.renderer.render(prompt, add_generation_prompt=True)],
        FeatureCache(model),
        sampling=Sampling(**options),
        prefix_cache=prefixes,
    )[0]


def assert_same(one: GenerationOutput, other: GenerationOutput) -> None:
    assert one.finish == other.finish
    assert one.ids == other.ids
    assert len(one.pieces) == len(other.pieces)
    for piece, wanted in zip(one.pieces, other.pieces, strict=True):
        if isinstance(wanted, SignalSpan):
            assert isinstance(piece, SignalSpan)
            assert torch.allclose(piece.states, wanted.states, atol=1e-4)
        else:
            assert piece == wanted


def inclined(model: AnyToAny, key: str) -> None:
    """Make signal spans of `key` the second-likeliest choice everywhere."""
    head = model.llm.head

    def biased(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        logits[..., model.llm.tokens.logit_index(key)] = logits.amax(-1) - 0.5
        return logits

    model.llm.head = biased


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "top_k": 3},
        {"repetition_penalty": 1.02},
        {"modalities": {"image": "force"}},
        {"modalities": {"image": "force", "video": "force", "audio": "force"}, "stop": ["e"]},
        {"max_new_tokens": 9},
        {"temperature": 0.5, "top_k": 3, "max_media": 2},
    ],
    ids=str,
)
def test_draft_tokens_change_no_reply(make_model: Callable[..., AnyToAny], options: dict) -> None:
    passes, runs = {0: 0, 5: 0}, 0
    for seed in range(3):
        model = make_model(seed)
        inclined(model, "image")
        widths = counted(model)
        for prompt in PROMPTS:
            found = {}
            for lookup in passes:
                before = len(widths)
                wishes = {"max_new_tokens": 40, "num_draft_tokens": lookup} | options
                found[lookup] = answer(model, prompt, **wishes)
                passes[lookup] += len(widths) - before
            assert_same(found[5], found[0])
            runs += len(found[5].spans)
    assert passes[5] < passes[0]
    if options.get("top_k") or "modalities" in options:
        assert runs


def test_two_pending_media_are_read_in_one_pass(tiny_model: AnyToAny) -> None:
    widths, wishes = counted(tiny_model), {"audio": "force", "image": "force"}
    made = answer(tiny_model, PROMPTS[0], max_new_tokens=3, modalities=wishes)
    assert [run.key for run in made.spans] == ["audio", "image"]
    assert widths[-1] == sum(len(run.states) for run in made.spans)


def test_what_is_kept_for_later_turns_holds_no_draft_tokens(tiny_model: AnyToAny) -> None:
    kept = []
    for lookup in (0, 5):
        prefixes = PrefixCache()
        answer(tiny_model, PROMPTS[0], prefixes, max_new_tokens=30, num_draft_tokens=lookup)
        kept += prefixes.entries
    first, second = kept
    assert first.keys == second.keys
    for one, two in zip(first.cache.layers, second.cache.layers, strict=True):
        assert one.keys.shape[2] == len(first.keys)
        assert torch.allclose(one.keys, two.keys, atol=1e-4)
        assert torch.allclose(one.values, two.values, atol=1e-4)


def test_a_negative_number_of_draft_tokens_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="num_draft_tokens: expected a whole number of at least 0, got -1"
    ):
        Sampling(num_draft_tokens=-1)
