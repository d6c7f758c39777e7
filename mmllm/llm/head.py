"""-log p of labels from hidden states: head and loss in one, forward and gradient at once.

Logits of P x V never stand in memory together, and none is computed twice: a chunk's logits become
the gradient of its hidden states while they are there. The words of the head are frozen, so that
they need no gradient; the rows of outputs (mmllm.llm.causal_lm) share one softmax with them.
Legend: P positions, D width, V words, O rows of outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024
"""Positions whose logits stand in memory at once in training."""
BLOCK = 16
"""Those of a chunk that a CPU's cache holds while they are worked at."""


@dataclass(frozen=True)
class LogitShape:
    """What a family does to the product of hidden states and head: a factor (Cohere, Granite,
    Falcon-H1), then a soft cap (Gemma 2 and later)."""

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitShape:
        """Read from the language model's own config, under the names of its families."""
        factor = getattr(config, "logit_scale", None) or 1.0
        factor *= getattr(config, "lm_head_multiplier", None) or 1.0
        factor /= getattr(config, "logits_scaling", None) or 1.0
        return cls(factor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """float[…, V + O], as the head's product gives them -> the model's logits."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """How fast the model's logits change with the head's product, where they are these."""
        return self.factor if self.cap is None else self.factor * (1 - (logits / self.cap).square())


@dataclass(frozen=True)
class Head:
    """`words` float[V, D] and `bias` float[V] or None, frozen; `rows` float[O, D]. `fused`: by
    Liger's kernel (Hsu et al. 2024), which needs CUDA."""

    words: Tensor
    bias: Tensor | None
    rows: Tensor
    shape: LogitShape
    fused: bool = False

    def nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """float[P, D] and int[P], labels from V on meaning rows -> float32[P]."""
        return _Nats.apply(hidden, self.rows, labels, self)  # pyright: ignore[reportReturnType]


class _Nats(torch.autograd.Function):
    """Each position's loss depends on its own hidden state alone, so its gradient can be kept
    before it is known what the loss will be multiplied with."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, labels: Tensor, head: Head) -> Tensor:
        chunk = _fused_chunk if head.fused else _chunk
        rows = rows.to(hidden.dtype)
        needed = ctx.needs_input_grad[0]
        parts = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        found = [chunk(states, rows, wanted, head, needed) for states, wanted in parts]
        nats, by_hidden, by_rows = (torch.cat(part) for part in zip(*found, strict=True))
        ctx.save_for_backward(hidden, by_hidden, by_rows)
        return nats

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        hidden, by_hidden, by_rows = ctx.saved_tensors
        scale = gradients[0][:, None]  # float32[P, 1]
        return (
            (by_hidden * scale).to(hidden.dtype) if ctx.needs_input_grad[0] else None,
            (by_rows * scale).T @ hidden.float(),
            None,
            None,
        )


def _chunk(
    hidden: Tensor, rows: Tensor, labels: Tensor, head: Head, needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some positions: -log p float32[P], its gradient by the hidden state float[P, D] (empty
    unless `needed`), and by the rows' product with it float32[P, O]."""
    words, chosen, is_word = _chosen(labels, head)
    logits = F.linear(hidden, head.words, head.bias)  # [P, V]
    of_rows = head.shape(F.linear(hidden, rows)).float()  # [P, O]
    size = BLOCK if hidden.device.type == "cpu" else CHUNK
    blocks = zip(
        logits.split(size),
        words.split(size),
        is_word.split(size),
        of_rows.logsumexp(-1).split(size),
        strict=True,
    )
    found = [_block(*block, head, needed) for block in blocks]
    total, said = (torch.cat(part) for part in zip(*found, strict=True))
    nats = total - torch.where(is_word, said, _pick(of_rows, chosen))
    by_rows = _by_rows(of_rows, total, chosen, is_word, head)
    if not needed:
        return nats, hidden[:0], by_rows
    by_hidden = logits.to(head.words.dtype) @ head.words + by_rows.to(rows.dtype) @ rows
    return nats, by_hidden, by_rows


def _block(
    logits: Tensor, words: Tensor, is_word: Tensor, of_rows: Tensor, head: Head, needed: bool
) -> tuple[Tensor, Tensor]:
    """Of some of a chunk's positions: log of the sum over words and rows float32[P], and what the
    head says of the label, if it is a word, float32[P]. With `needed` the logits become the
    gradient of -log p by the head's product."""
    of_words = head.shape(logits).float()
    said = of_words.gather(1, words)[:, 0]
    slope = head.shape.slope(of_words)
    most = of_words.amax(-1, keepdim=True)
    by_words = of_words.sub_(most).exp_()
    total = torch.logaddexp(by_words.sum(-1).log() + most[:, 0], of_rows)
    if needed:
        by_words *= (most - total[:, None]).exp()
        by_words.scatter_add_(1, words, -is_word.float()[:, None])
        if head.shape != LogitShape():
            by_words *= slope
        logits.copy_(by_words)
    return total, said


def _fused_chunk(
    hidden: Tensor, rows: Tensor, labels: Tensor, head: Head, needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by Liger's kernel, which knows of words alone: its softmax is that of all words and
    rows but for the words' share of it."""
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        fused_linear_cross_entropy_forward,
    )

    words, chosen, is_word = _chosen(labels, head)
    words = words[:, 0]
    states = (hidden * head.shape.factor).to(head.words.dtype)
    told = fused_linear_cross_entropy_forward(
        states,
        head.words,
        words,
        bias=None if head.bias is None else head.bias * head.shape.factor,
        reduction="none",
        softcap=head.shape.cap,
        compute_gradients=needed,
        weight_requires_grad=False,
    )
    of_word, by_states = told[0], told[4]
    bias = 0.0 if head.bias is None else head.bias[words]
    product = (hidden.float() * head.words[words].float()).sum(-1) + bias
    said_word = head.shape(product)  # [P]
    of_words = of_word + said_word  # log of the sum over words
    of_rows = head.shape(F.linear(hidden, rows)).float()
    sum_rows = of_rows.logsumexp(-1)
    total = torch.logaddexp(of_words, sum_rows)
    share = torch.sigmoid(of_words - sum_rows)[:, None]
    nats = torch.where(
        is_word, of_word + F.softplus(sum_rows - of_words), total - _pick(of_rows, chosen)
    )
    by_rows = _by_rows(of_rows, total, chosen, is_word, head)
    if not needed:
        return nats, hidden[:0], by_rows
    slope = head.shape.slope(said_word)
    slope = slope[:, None] if isinstance(slope, Tensor) else slope
    by_hidden = share * by_states.float() * head.shape.factor
    by_hidden += (share - is_word[:, None].float()) * slope * head.words[words].float()
    by_hidden += by_rows @ rows.float()
    return nats, by_hidden.to(hidden.dtype), by_rows


def _chosen(labels: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Each label as a word int[P, 1] (0 if it is none) and as a row int[P], and which it is."""
    count = len(head.words)
    is_word = labels < count
    return torch.where(is_word, labels, 0)[:, None], (labels - count).clamp_min(0), is_word


def _pick(of_rows: Tensor, chosen: Tensor) -> Tensor:
    """float[P, O] and int[P] -> float[P]; nothing is chosen where there are no rows."""
    if of_rows.shape[1] == 0:
        return of_rows.new_zeros(len(chosen))
    return of_rows.gather(1, chosen[:, None])[:, 0]


def _by_rows(of_rows: Tensor, total: Tensor, chosen: Tensor, is_word: Tensor, head: Head) -> Tensor:
    """The gradient of -log p by the product of hidden state and rows: float32[P, O]."""
    found = (of_rows - total[:, None]).exp()
    if found.shape[1]:
        found.scatter_add_(1, chosen[:, None], is_word.float()[:, None] - 1)
    return found * head.shape.slope(of_rows)
