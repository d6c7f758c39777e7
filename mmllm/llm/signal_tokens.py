"""Signal tokens of a language model: small tables in addition to its frozen embedding and head.

A signal token is an id from V on that the model writes in place of a medium (mmllm.tokens). peft's
trainable token rows would copy the whole embedding table at every step; these tables hold the new
rows alone, and they train by themselves.

Legend: B sequences, T positions, P gathered positions, D width, V text vocabulary, R signal tokens,
O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.tokens import TokenSpace


def init_signal_tables(
    tokens: TokenSpace, width: int, scale: float, generator: torch.Generator
) -> tuple[nn.Parameter, nn.Parameter]:
    """Draw the tables of new signal tokens.

    Args:
        tokens: The ids, with the number of signal tokens of each output.
        width: D.
        scale: Root mean square of embedded text tokens, which the new embeddings have too.
        generator: Source of randomness.

    Returns:
        The embeddings float[R, D] and the rows of the head float[O, D]: one per output, because
        only the first token of a signal span is ever predicted.
    """
    embeddings = torch.randn(tokens.num_signals, width, generator=generator) * scale
    head = torch.randn(len(tokens.outputs), width, generator=generator) * scale * 0.1
    return nn.Parameter(embeddings), nn.Parameter(head)


def embed_tokens(
    ids: Tensor, embedding: nn.Module, signal_embeddings: Tensor, tokens: TokenSpace
) -> Tensor:
    """Embed text and signal tokens; placeholders of media become zero.

    Args:
        ids: int[B, T]: text tokens below V, then signal tokens, then the placeholder.
        embedding: the LLM's embedding of text tokens.
        signal_embeddings: float[S, D] of the signal tokens.
        tokens: the token space.

    Returns:
        float[B, T, D].
    """
    vocab_size = tokens.vocab_size
    text = embedding(ids.clamp_max(vocab_size - 1)).to(ids.device)
    # One zero row stands for the placeholder; without outputs the table is that row alone.
    table = F.pad(signal_embeddings, (0, 0, 0, 1)).to(text.dtype)
    signals = F.embedding((ids - vocab_size).clamp(0, tokens.num_signals), table)
    return torch.where((ids < vocab_size)[..., None], text, signals)


def append_signal_logits(text_logits: Tensor, hidden: Tensor, signal_head: Tensor) -> Tensor:
    """Append the logits of each output's first signal token to those of the text tokens.

    Args:
        text_logits: float[P, V].
        hidden: float[P, D], last hidden states.
        signal_head: float[O, D], a row for each output modality.

    Returns:
        float[P, V + O].
    """
    signal_logits = hidden @ signal_head.to(hidden).T
    return torch.cat([text_logits, signal_logits.to(text_logits)], dim=-1)
