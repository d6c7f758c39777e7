"""Perplexity of plain text: has training cost the language model its own ability?

Legend: B windows, T = 512 positions, V text vocabulary, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.model import AnyToAny

WINDOW = 512
_BATCH = 4


@dataclass(frozen=True)
class Perplexity:
    """Of one text: with LoRA and new rows active, and of the base model."""

    tokens: int
    adapted_nll: float
    base_nll: float

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(
            self.tokens + other.tokens,
            self.adapted_nll + other.adapted_nll,
            self.base_nll + other.base_nll,
        )

    @property
    def adapted(self) -> float:
        return math.exp(self.adapted_nll / self.tokens)

    @property
    def base(self) -> float:
        return math.exp(self.base_nll / self.tokens)

    @property
    def ratio(self) -> float:
        return self.adapted / self.base


def measure(
    model: AnyToAny,
    text: str,
    *,
    window: int = WINDOW,
    num: int | None = None,
    tick: Callable[[int], object] = lambda _: None,
) -> Perplexity:
    """Windows that do not overlap, each read alone; its first token is given, not counted.

    With the rows of signal tokens in the softmax, what the model would rather draw than say
    counts against it. `num`: windows at most.
    """
    llm = model.llm
    ids = torch.tensor(llm.tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // window * window].view(-1, window)[:num]
    if not len(windows):
        raise ValueError(f"perplexity: {len(ids)} tokens, but a window is {window}")
    adapted = base = 0.0
    for group in windows.split(_BATCH):
        adapted += _total_nll(model, group, rows=True)
        with llm.adapters_disabled():
            base += _total_nll(model, group, rows=False)
        tick(len(group))
    return Perplexity(len(windows) * (window - 1), adapted, base)


@torch.inference_mode()
def _total_nll(model: AnyToAny, ids: Tensor, *, rows: bool) -> float:
    """int[B, T] -> the sum of -log p of every token but the first; `rows`: V + O in the softmax."""
    llm, ids = model.llm, ids.to(model.device)
    hidden = llm(llm.embed(ids))  # [B, T, D]
    total = 0.0
    for states, following in zip(hidden[:, :-1], ids[:, 1:], strict=True):
        logits = llm.head(states).float()  # [T - 1, V + O]
        if not rows:
            logits = logits[:, : llm.tokens.vocabulary]
        total += F.cross_entropy(logits, following, reduction="sum").item()
    return total
