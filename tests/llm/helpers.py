"""Helpers of the tests of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmllm import config
from mmllm.llm.language_model import LanguageModel
from tests.llm.families import WINDOW

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
