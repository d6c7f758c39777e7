"""Helpers of the tests of language models."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmllm import config
from mmllm.conversation import assistant, user
from mmllm.data.batch import BatchLayout, collate
from mmllm.llm.language_model import LanguageModel
from mmllm.model import AnyToAny
from tests.llm.families import WINDOW

TALK = [user("What is this?"), assistant("a red apple"), user("one  two\n three"), assistant("ten")]

OUTPUTS = {"image": 3, "audio": 2}
"""Output key -> signal tokens."""


def with_outputs(folder: Path, **changes: Any) -> LanguageModel:
    """The language model of a folder, with signal tokens and a config that allows LoRA."""
    tree = {"weights": str(folder), "lora": {"rank": 2}, **changes}
    llm = config.build(config.parse_component("llm", tree, "llm", default="causal_lm"))
    llm.add_signal_tokens(OUTPUTS, torch.Generator().manual_seed(0))
    return llm.eval()


def plain(folder: Path) -> Any:
    """The same weights as transformers alone loads them."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids_of(folder: Path, length: int = 3 * WINDOW) -> Tensor:
    """Random ids of a folder's tokenizer: int[2, length]."""
    count = len(AutoTokenizer.from_pretrained(folder))
    return torch.randint(count, (2, length), generator=torch.Generator().manual_seed(1))


def adapted(llm: LanguageModel) -> LanguageModel:
    """Attach adapters that change its logits."""
    llm.attach_lora()
    generator = torch.Generator().manual_seed(3)
    for _, parameter in llm.lora_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return llm


@torch.no_grad()
def logits_of(llm: LanguageModel, ids: Tensor) -> Tensor:
    """int[B, T] -> float[B, T, V + O]"""
    return llm.head(llm(llm.embed(ids)))


def assert_rows_have_the_same_states(whole: AnyToAny, shares: Collection[bool]) -> None:
    """Single, padded and packed rows, the latter with a shared prefix or without."""
    items = [whole.renderer.render(talk) for talk in ([*TALK], [TALK[0], assistant("two")])]
    assert min(map(len, items)) > WINDOW

    def states(batch: Any) -> Tensor:
        return whole.hidden(batch).flatten(0, 1)[batch.target_indices]

    def batched(some: Any, **options: Any) -> Any:
        return collate(some, None, BatchLayout({}, {}), **options)

    single = torch.cat([states(batched([item])) for item in items])
    padded = batched(items)
    assert padded.prefix_len > 0
    torch.testing.assert_close(states(padded), single, atol=1e-4, rtol=1e-4)
    for share in shares:
        packed = batched(items, pack=True, share=share)
        assert packed.ids.shape[0] == 1
        assert (packed.prefix_len > 0) == share
        torch.testing.assert_close(states(packed), single, atol=1e-4, rtol=1e-4)
