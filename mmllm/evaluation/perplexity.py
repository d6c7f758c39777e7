"""Perplexity of plain text with and without the adapters: what training cost the language model.

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
    """Summed negative log-likelihoods of one text.

    Attributes:
        tokens: number of predicted tokens.
        adapted_nll: with LoRA and the signal tokens' embeddings active.
        base_nll: of the base model.
    """

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
        """Perplexity of the adapted model."""
        return math.exp(self.adapted_nll / self.tokens)

    @property
    def base(self) -> float:
        """Perplexity of the base model."""
        return math.exp(self.base_nll / self.tokens)

    @property
    def ratio(self) -> float:
        """Adapted over base: 1 if training cost nothing."""
        return self.adapted / self.base


def measure(
    model: AnyToAny,
    text: str,
    *,
    window: int = WINDOW,
    num_windows: int | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> Perplexity:
    """Perplexity over non-overlapping windows; the first token of each is context only.

    The adapted model's softmax includes the signal tokens, so probability mass on them counts
    against it.

    Args:
        model: the adapted model.
        text: plain text.
        window: tokens per window.
        num_windows: windows at most, from the beginning.
        on_progress: called with the number of windows after each batch.

    Raises:
        ValueError: the text is shorter than one window.
    """
    llm = model.llm
    ids = torch.tensor(llm.tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // window * window].view(-1, window)[:num_windows]
    if not len(windows):
        raise ValueError(f"perplexity: {len(ids)} tokens, but a window is {window}")
    adapted = base = 0.0
    for group in windows.split(_BATCH):
        adapted += _total_nll(model, group, with_signals=True)
        with llm.adapters_disabled():
            base += _total_nll(model, group, with_signals=False)
        on_progress(len(group))
    return Perplexity(len(windows) * (window - 1), adapted, base)


@torch.inference_mode()
def _total_nll(model: AnyToAny, ids: Tensor, *, with_signals: bool) -> float:
    """int[B, T] -> summed NLL of all tokens but the first of each window.

    `with_signals`: softmax over V + O instead of V logits."""
    llm, ids = model.llm, ids.to(model.device)
    hidden = llm(llm.embed(ids))  # [B, T, D]
    total = 0.0
    for states, targets in zip(hidden[:, :-1], ids[:, 1:], strict=True):
        logits = llm.head(states).float()  # [T - 1, V + O]
        if not with_signals:
            logits = logits[:, : llm.tokens.vocab_size]
        total += F.cross_entropy(logits, targets, reduction="sum").item()
    return total
