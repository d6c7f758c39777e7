"""Losses from hidden states, head and loss in one, forward and gradient at once: -log p of labels,
and how far what is said is from what another state would say.

Logits of P x V never stand in memory together, and none is computed twice: a chunk's logits become
the gradient of its hidden states while they are there. The words of the head are frozen, so that
they need no gradient; the rows of outputs (mmllm.llm.causal_lm) share one softmax with them.
Legend: P positions, D width, V words, O rows of outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.llm.frozen import Frozen

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
    """`words`: of float[V, D]; `rows` float[O, D]. `fused`: by Liger's kernel (Hsu et al. 2024),
    which needs CUDA."""

    words: Frozen
    rows: Tensor
    shape: LogitShape
    fused: bool = False

    def token_nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """float[P, D] and int[P], labels from V on meaning rows -> float32[P]."""
        chunk = _fused_chunk if self.fused else _chunk
        return _Loss.apply(hidden, self.rows, labels, self, chunk)  # pyright: ignore

    def kl_divergence(self, hidden: Tensor, fixed: Tensor) -> Tensor:
        """Kullback-Leibler divergence of what is said after `hidden` float[P, D] from the words
        that would be said after `fixed` float[P, D], which gets no gradient: float32[P]."""
        return _Loss.apply(hidden, self.rows, fixed, self, _divergence_chunk)  # pyright: ignore


class _Loss(torch.autograd.Function):
    """Each position's loss depends on its own hidden state alone, so its gradient can be kept
    before it is known what the loss will be multiplied with."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, hidden: Tensor, rows: Tensor, wanted: Tensor, head: Head, chunk: _Chunk
    ) -> Tensor:
        rows = rows.to(hidden.dtype)
        needed = ctx.needs_input_grad[0]
        parts = zip(hidden.split(CHUNK), wanted.split(CHUNK), strict=True)
        found = [chunk(states, rows, its, head, needed) for states, its in parts]
        token_nll, by_hidden, by_rows = (torch.cat(part) for part in zip(*found, strict=True))
        ctx.save_for_backward(hidden, by_hidden, by_rows)
        return token_nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, by_hidden, by_rows = ctx.saved_tensors
        scale = gradients[0][:, None]  # float32[P, 1]
        return (
            (by_hidden * scale).to(hidden.dtype) if ctx.needs_input_grad[0] else None,
            (by_rows * scale).T @ hidden.float(),
            None,
            None,
            None,
        )


_Chunk = Callable[[Tensor, Tensor, Tensor, Head, bool], tuple[Tensor, Tensor, Tensor]]
"""Of some positions: the loss float32[P], its gradient by the hidden state float[P, D] (empty
unless needed), and by the rows' product with it float32[P, O]."""


def _chunk(
    hidden: Tensor, rows: Tensor, labels: Tensor, head: Head, needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    words, chosen, is_word = _chosen(labels, head)
    logits = head.words.forward(hidden)  # [P, V]
    of_rows = head.shape(F.linear(hidden, rows)).float()  # [P, O]
    size = _block_size(hidden)
    blocks = zip(
        logits.split(size),
        words.split(size),
        is_word.split(size),
        of_rows.logsumexp(-1).split(size),
        strict=True,
    )
    found = [_block(*block, head, needed) for block in blocks]
    total, said = (torch.cat(part) for part in zip(*found, strict=True))
    token_nll = total - torch.where(is_word, said, _pick(of_rows, chosen))
    by_rows = _by_rows(of_rows, total, chosen, is_word, head)
    if not needed:
        return token_nll, hidden[:0], by_rows
    return token_nll, _by_hidden(logits, by_rows, rows, head), by_rows


def _by_hidden(by_words: Tensor, by_rows: Tensor, rows: Tensor, head: Head) -> Tensor:
    """The gradient by hidden states from those by words' and rows' products with them."""
    dtype = head.words.weight.dtype
    return head.words.backward(by_words.to(dtype)) + by_rows.to(rows.dtype) @ rows


def _block_size(hidden: Tensor) -> int:
    return BLOCK if hidden.device.type == "cpu" else CHUNK


def _divergence_chunk(
    hidden: Tensor, rows: Tensor, fixed: Tensor, head: Head, needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits, others = head.words.forward(hidden), head.words.forward(fixed)  # [P, V]
    of_rows = head.shape(F.linear(hidden, rows)).float()  # [P, O]
    size = _block_size(hidden)
    blocks = zip(
        logits.split(size), others.split(size), of_rows.logsumexp(-1).split(size), strict=True
    )
    found = [_divergence_block(*block, head, needed) for block in blocks]
    total, kl = (torch.cat(part) for part in zip(*found, strict=True))
    by_rows = (of_rows - total[:, None]).exp() * head.shape.slope(of_rows)
    return kl, _by_hidden(logits, by_rows, rows, head) if needed else hidden[:0], by_rows


def _divergence_block(
    logits: Tensor, others: Tensor, of_rows: Tensor, head: Head, needed: bool
) -> tuple[Tensor, Tensor]:
    """As `_block`, of the words that `others` make likely in place of one label."""
    of_words, wanted = head.shape(logits).float(), head.shape(others).float().log_softmax(-1)
    total = torch.logaddexp(of_words.logsumexp(-1), of_rows)
    likely = wanted.exp()
    kl = wanted.sub_(of_words).mul_(likely).sum(-1) + total
    if needed:
        slope = head.shape.slope(of_words)
        by_words = of_words.sub_(total[:, None]).exp_().sub_(likely)
        if head.shape != LogitShape():
            by_words *= slope
        logits.copy_(by_words)
    return total, kl


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
    weight, its_bias = head.words.weight, head.words.bias
    states = (hidden * head.shape.factor).to(weight.dtype)
    told = fused_linear_cross_entropy_forward(
        states,
        weight,
        words,
        bias=None if its_bias is None else its_bias * head.shape.factor,
        reduction="none",
        softcap=head.shape.cap,
        compute_gradients=needed,
        weight_requires_grad=False,
    )
    of_word, by_states = told[0], told[4]
    bias = 0.0 if its_bias is None else its_bias[words]
    product = (hidden.float() * weight[words].float()).sum(-1) + bias
    said_word = head.shape(product)  # [P]
    of_words = of_word + said_word  # log of the sum over words
    of_rows = head.shape(F.linear(hidden, rows)).float()
    sum_rows = of_rows.logsumexp(-1)
    total = torch.logaddexp(of_words, sum_rows)
    share = torch.sigmoid(of_words - sum_rows)[:, None]
    token_nll = torch.where(
        is_word, of_word + F.softplus(sum_rows - of_words), total - _pick(of_rows, chosen)
    )
    by_rows = _by_rows(of_rows, total, chosen, is_word, head)
    if not needed:
        return token_nll, hidden[:0], by_rows
    slope = head.shape.slope(said_word)
    slope = slope[:, None] if isinstance(slope, Tensor) else slope
    by_hidden = share * by_states.float() * head.shape.factor
    by_hidden += (share - is_word[:, None].float()) * slope * weight[words].float()
    by_hidden += by_rows @ rows.float()
    return token_nll, by_hidden.to(hidden.dtype), by_rows


def _chosen(labels: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Each label as a word int[P, 1] (0 if it is none) and as a row int[P], and which it is."""
    count = len(head.words.weight)
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
