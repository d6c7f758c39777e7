"""The reference of the kernels: the same results by torch and transformers alone.

It is what `kernels: reference` runs, and what the tests compare every kernel with. It is slow on
purpose: nothing is shared, packed or fused.

Legend: T positions of the pack, C sequences, L = prefix and longest sequence, P positions, D width,
V text vocabulary, O signal tokens that can be predicted (outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


def forward_unpacked(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    embeds: Tensor,
    prefix_len: int,
    seq_lens: Sequence[int],
    positions: Tensor | None = None,
) -> Tensor:
    """Compute the hidden states of a pack by one padded row per sequence, each with the prefix.

    Args:
        forward: (embeds float[C, L, D], mask bool[C, L], positions int[C, L]) -> float[C, L, D].
        embeds: float[1, T, D], the prefix and then the sequences.
        prefix_len: Length of the prefix that all sequences share.
        seq_lens: Lengths of the C sequences without the prefix.
        positions: int[1, T, 3], the positions of the pack; None: 0, 1, … in each row.

    Returns:
        float[1, T, D]; the prefix's states are those of the first row.
    """

    def to_rows(pack: Tensor) -> Tensor:
        prefix, *sequences = torch.split(pack[0], [prefix_len, *seq_lens])
        return pad_sequence([torch.cat([prefix, part]) for part in sequences], batch_first=True)

    rows = to_rows(embeds)
    lengths = prefix_len + torch.tensor(seq_lens)
    columns = torch.arange(rows.shape[1]).expand(len(rows), -1)
    mask = (columns < lengths[:, None]).to(embeds.device)
    places = columns.to(embeds.device) if positions is None else to_rows(positions)
    states = forward(rows, mask, places)
    ends = [prefix_len + length for length in seq_lens]
    parts = [row[prefix_len:end] for row, end in zip(states, ends, strict=True)]
    return torch.cat([states[0, :prefix_len], *parts])[None]


@dataclass(frozen=True)
class ReferenceHead:
    """The losses of a head by whole logits, with the interface of `FrozenHead`.

    Args:
        logits: Computes the logits of text tokens and then outputs: float[P, D] -> float[P, V + O].
        vocab_size: V.
    """

    logits: Callable[[Tensor], Tensor]
    vocab_size: int

    def token_nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Compute -log p of each label.

        Args:
            hidden: float[P, D].
            labels: int[P].

        Returns:
            float32[P].
        """
        return F.cross_entropy(self.logits(hidden).float(), labels, reduction="none")

    def kl_divergence(self, hidden: Tensor, base_hidden: Tensor) -> Tensor:
        """Compute KL(base || adapted), the base distribution over text tokens only.

        Args:
            hidden: float[P, D] of the adapted model.
            base_hidden: float[P, D] of the model without adapters.

        Returns:
            float32[P].
        """
        log_probs = self.logits(hidden).float().log_softmax(-1)[:, : self.vocab_size]
        base_logits = self.logits(base_hidden)[:, : self.vocab_size]
        base_log_probs = base_logits.float().log_softmax(-1)
        return F.kl_div(log_probs, base_log_probs, reduction="none", log_target=True).sum(-1)
