"""Fused linear cross-entropy and KL divergence: head, loss and gradient without P x V logits.

Logits are computed for `CHUNK_SIZE` positions at a time, once each: a chunk's logits are
overwritten by their own gradient, from which the gradient of the hidden states follows at once. The
text vocabulary's part of the head is frozen and needs no gradient; the signal head, one row per
output modality, trains and shares one softmax with it.

Legend: P positions, D width, V text vocabulary, O signal tokens that can be predicted (outputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.kernels.prepacked_linear import FrozenLinear

CHUNK_SIZE = 1024
"""Positions whose logits are in memory at once in training."""
BLOCK_SIZE = 16
"""Positions of a chunk whose logits a CPU's cache holds while they are worked at."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model family does to the product of hidden states and head: a factor (Cohere, Granite,
    Falcon-H1), then soft capping (Gemma 2 and later)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read it from a language model's own config, under the names of its families."""
        scale = getattr(config, "logit_scale", None) or 1.0
        scale *= getattr(config, "lm_head_multiplier", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """Map the head's product to the model's logits: float[…, V + O] -> the same shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def derivative(self, logits: Tensor) -> Tensor | float:
        """Return d logits / d product, given the transformed logits."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (logits / self.softcap).square())


@dataclass(frozen=True)
class FrozenHead:
    """A language model's head over its text vocabulary and the signal tokens.

    Args:
        vocab: The frozen head over text tokens, with a weight float[V, D].
        signal_head: float[O, D], trained.
        transform: What the family does to the logits.
        liger: Compute `token_nll` by Liger's kernel (Hsu et al. 2024), which needs CUDA.
    """

    vocab: FrozenLinear
    signal_head: Tensor
    transform: LogitTransform
    liger: bool = False

    def token_nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Compute -log p(label) for each position.

        Args:
            hidden: float[P, D].
            labels: int[P]; V + o is signal token o.

        Returns:
            float32[P].
        """
        chunk = _liger_nll_chunk if self.liger else _nll_chunk
        return TokenLossFn.apply(hidden, self.signal_head, labels, self, chunk)  # pyright: ignore

    def kl_divergence(self, hidden: Tensor, base_hidden: Tensor) -> Tensor:
        """Compute KL(base ‖ adapted) for each position, where the base distribution is over text
        tokens only: probability that the adapted one gives to signal tokens counts as divergence.

        Args:
            hidden: float[P, D], the adapted model's hidden states.
            base_hidden: float[P, D], the base model's, without a gradient.

        Returns:
            float32[P].
        """
        return TokenLossFn.apply(hidden, self.signal_head, base_hidden, self, _kl_chunk)  # pyright: ignore


class TokenLossFn(torch.autograd.Function):
    """A loss for each position, of its own hidden state alone: so its gradient can be computed in
    the forward pass, before it is known what the loss will be multiplied with."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        hidden: Tensor,
        signal_head: Tensor,
        targets: Tensor,
        head: FrozenHead,
        chunk: _ChunkFn,
    ) -> Tensor:
        signal_head = signal_head.to(hidden.dtype)
        needs_grad = ctx.needs_input_grad[0]
        chunks = zip(hidden.split(CHUNK_SIZE), targets.split(CHUNK_SIZE), strict=True)
        results = [
            chunk(states, signal_head, target, head, needs_grad) for states, target in chunks
        ]
        losses, hidden_grad, signal_grad = (
            torch.cat(parts) for parts in zip(*results, strict=True)
        )
        ctx.save_for_backward(hidden, hidden_grad, signal_grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, hidden_grad, signal_grad = ctx.saved_tensors
        scale = grads[0][:, None]  # float32[P, 1]
        return (
            (hidden_grad * scale).to(hidden.dtype) if ctx.needs_input_grad[0] else None,
            (signal_grad * scale).T @ hidden.float(),
            None,
            None,
            None,
        )


_ChunkFn = Callable[[Tensor, Tensor, Tensor, FrozenHead, bool], tuple[Tensor, Tensor, Tensor]]
"""(hidden, signal_head, targets, head, needs_grad) of some positions -> the loss float32[P], its
gradient with respect to the hidden states float[P, D] (empty unless needed), and with respect to
the signal head's product float32[P, O]."""


def _nll_chunk(
    hidden: Tensor, signal_head: Tensor, labels: Tensor, head: FrozenHead, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `token_nll` of a chunk; see `_ChunkFn`."""
    text_labels, signal_labels, is_text = _split_labels(labels, head)
    text_logits = head.vocab.forward(hidden)  # [P, V], before the transform
    signal_logits = head.transform(F.linear(hidden, signal_head)).float()  # [P, O]
    targets = (text_labels, is_text, signal_logits.logsumexp(-1))
    log_normalizer, text_logit = _by_blocks(_nll_block, text_logits, targets, head, needs_grad)
    label_logit = torch.where(is_text, text_logit, _gather_labels(signal_logits, signal_labels))
    losses = log_normalizer - label_logit
    signal_grad = _signal_nll_grad(signal_logits, log_normalizer, signal_labels, is_text, head)
    hidden_grad = _hidden_grad(text_logits, signal_grad, signal_head, head, needs_grad)
    return losses, hidden_grad, signal_grad


def _nll_block(
    text_logits: Tensor,
    text_labels: Tensor,
    is_text: Tensor,
    signal_lse: Tensor,
    head: FrozenHead,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the log normalizer over all tokens float32[P] and the logit of the label where it is
    a text token float32[P]. With `needs_grad`, `text_logits` are overwritten by the gradient of
    -log p with respect to the head's product."""
    logits = head.transform(text_logits).float()
    label_logit = logits.gather(1, text_labels)[:, 0]
    derivative = head.transform.derivative(logits)
    maximum = logits.amax(-1, keepdim=True)
    grad = logits.sub_(maximum).exp_()
    log_normalizer = torch.logaddexp(grad.sum(-1).log() + maximum[:, 0], signal_lse)
    if needs_grad:
        grad *= (maximum - log_normalizer[:, None]).exp()
        grad.scatter_add_(1, text_labels, -is_text.float()[:, None])
        if head.transform != LogitTransform():
            grad *= derivative
        text_logits.copy_(grad)
    return log_normalizer, label_logit


def _kl_chunk(
    hidden: Tensor, signal_head: Tensor, base_hidden: Tensor, head: FrozenHead, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `kl_divergence` of a chunk; see `_ChunkFn`."""
    text_logits = head.vocab.forward(hidden)  # [P, V], before the transform
    base_logits = head.vocab.forward(base_hidden)
    signal_logits = head.transform(F.linear(hidden, signal_head)).float()  # [P, O]
    targets = (base_logits, signal_logits.logsumexp(-1))
    log_normalizer, losses = _by_blocks(_kl_block, text_logits, targets, head, needs_grad)
    signal_grad = (signal_logits - log_normalizer[:, None]).exp()
    signal_grad = signal_grad * head.transform.derivative(signal_logits)
    hidden_grad = _hidden_grad(text_logits, signal_grad, signal_head, head, needs_grad)
    return losses, hidden_grad, signal_grad


def _kl_block(
    text_logits: Tensor,
    base_logits: Tensor,
    signal_lse: Tensor,
    head: FrozenHead,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the log normalizer and the divergence, float32[P] each. With `needs_grad`,
    `text_logits` are overwritten by the gradient with respect to the head's product."""
    logits = head.transform(text_logits).float()
    base_log_probs = head.transform(base_logits).float().log_softmax(-1)
    log_normalizer = torch.logaddexp(logits.logsumexp(-1), signal_lse)
    base_probs = base_log_probs.exp()
    kl = base_log_probs.sub_(logits).mul_(base_probs).sum(-1) + log_normalizer
    if needs_grad:
        derivative = head.transform.derivative(logits)
        grad = logits.sub_(log_normalizer[:, None]).exp_().sub_(base_probs)
        if head.transform != LogitTransform():
            grad *= derivative
        text_logits.copy_(grad)
    return log_normalizer, kl


def _liger_nll_chunk(
    hidden: Tensor, signal_head: Tensor, labels: Tensor, head: FrozenHead, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `token_nll` of a chunk by Liger's kernel, whose softmax is over text tokens alone:
    its loss and gradient are corrected by the text tokens' share of the whole softmax."""
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        fused_linear_cross_entropy_forward,
    )

    text_labels, signal_labels, is_text = _split_labels(labels, head)
    text_labels = text_labels[:, 0]
    weight, vocab_bias = head.vocab.weight, head.vocab.bias
    outputs = fused_linear_cross_entropy_forward(
        (hidden * head.transform.scale).to(weight.dtype),
        weight,
        text_labels,
        bias=None if vocab_bias is None else vocab_bias * head.transform.scale,
        reduction="none",
        softcap=head.transform.softcap,
        compute_gradients=needs_grad,
        weight_requires_grad=False,
    )
    text_nll, text_hidden_grad = outputs[0], outputs[4]
    bias = 0.0 if vocab_bias is None else vocab_bias[text_labels]
    label_product = (hidden.float() * weight[text_labels].float()).sum(-1) + bias
    label_logit = head.transform(label_product)  # [P]
    text_lse = text_nll + label_logit
    signal_logits = head.transform(F.linear(hidden, signal_head)).float()
    signal_lse = signal_logits.logsumexp(-1)
    log_normalizer = torch.logaddexp(text_lse, signal_lse)
    text_share = torch.sigmoid(text_lse - signal_lse)[:, None]
    losses = torch.where(
        is_text,
        text_nll + F.softplus(signal_lse - text_lse),
        log_normalizer - _gather_labels(signal_logits, signal_labels),
    )
    signal_grad = _signal_nll_grad(signal_logits, log_normalizer, signal_labels, is_text, head)
    if not needs_grad:
        return losses, hidden[:0], signal_grad
    derivative = head.transform.derivative(label_logit)
    derivative = derivative[:, None] if isinstance(derivative, Tensor) else derivative
    hidden_grad = text_share * text_hidden_grad.float() * head.transform.scale
    label_weight = weight[text_labels].float()
    hidden_grad += (text_share - is_text[:, None].float()) * derivative * label_weight
    hidden_grad += signal_grad @ signal_head.float()
    return losses, hidden_grad.to(hidden.dtype), signal_grad


def _by_blocks(
    block: Callable[..., tuple[Tensor, Tensor]],
    text_logits: Tensor,
    targets: tuple[Tensor, ...],
    head: FrozenHead,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Compute both results of `block`, `_nll_block` or `_kl_block`, for as many positions of
    `text_logits` and `targets` at a time as fit the device: float32[P] each."""
    size = BLOCK_SIZE if text_logits.device.type == "cpu" else CHUNK_SIZE
    blocks = zip(*(tensor.split(size) for tensor in (text_logits, *targets)), strict=True)
    first, second = zip(*(block(*each, head, needs_grad) for each in blocks), strict=True)
    return torch.cat(first), torch.cat(second)


def _hidden_grad(
    text_grad: Tensor,
    signal_grad: Tensor,
    signal_head: Tensor,
    head: FrozenHead,
    needs_grad: bool,
) -> Tensor:
    """Compute the gradient with respect to the hidden states from those with respect to both parts
    of the head's product; no rows unless it is needed."""
    if not needs_grad:
        return signal_head[:0]
    dtype = head.vocab.weight.dtype
    return (
        head.vocab.backward(text_grad.to(dtype)) + signal_grad.to(signal_head.dtype) @ signal_head
    )


def _signal_nll_grad(
    signal_logits: Tensor,
    log_normalizer: Tensor,
    signal_labels: Tensor,
    is_text: Tensor,
    head: FrozenHead,
) -> Tensor:
    """Compute the gradient of -log p with respect to the signal head's product: float32[P, O]."""
    grad = (signal_logits - log_normalizer[:, None]).exp()
    if grad.shape[1]:
        grad.scatter_add_(1, signal_labels[:, None], is_text.float()[:, None] - 1)
    return grad * head.transform.derivative(signal_logits)


def _split_labels(labels: Tensor, head: FrozenHead) -> tuple[Tensor, Tensor, Tensor]:
    """Return each label as a text token int[P, 1] (0 if it is none), as an index into the signal
    head int[P] (0 if it is none), and whether it is a text token bool[P]."""
    vocab_size = len(head.vocab.weight)
    is_text = labels < vocab_size
    text_labels = torch.where(is_text, labels, 0)[:, None]
    return text_labels, (labels - vocab_size).clamp_min(0), is_text


def _gather_labels(signal_logits: Tensor, signal_labels: Tensor) -> Tensor:
    """Select a logit for each position: float[P, O], int[P] -> float[P]; zeros without outputs."""
    if signal_logits.shape[1] == 0:
        return signal_logits.new_zeros(len(signal_labels))
    return signal_logits.gather(1, signal_labels[:, None])[:, 0]
