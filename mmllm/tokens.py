"""Token ids beyond the tokenizer's vocabulary: signal tokens of each output, and one placeholder.

With a vocabulary of V text tokens, ids V ... V+R-1 are the R signal tokens, output after output in
the order of the config; id V+R is the placeholder, a position that is filled with the embedding of
an input medium. The head has one logit per output, for the first token of its signal span: a span
that has begun always completes, so that its other tokens are never predicted. Logits are therefore
[V + O] for O outputs, and a label from V on is the logit of an output, not a token id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sources:
    """What the embeddings of one forward pass of the LLM stand for. Nothing is computed from it: it
    is for forward hooks, which see the embeddings alone (mmllm.insight).

    Attributes:
        ids: int[B, T]: a token id; for an embedding of the n-th encoder `placeholder_id` + n; -1 at
            padding.
        owners: an object per row; a row of a later pass that has the same one continues it. Empty
            where no pass continues another.
    """

    ids: Tensor
    owners: tuple[object, ...] = ()


class TokenSpace:
    """The ids of text tokens, signal tokens and the placeholder.

    Args:
        vocab_size: V, the rows of the language model's embedding table.
        signal_tokens: Number of signal tokens of each output, by output key.

    Example:
        >>> tokens = TokenSpace(1000, {"image": 3, "audio": 2})
        >>> tokens.signal_ids("audio"), tokens.logit_index("audio"), tokens.placeholder_id
        ([1003, 1004], 1001, 1005)
    """

    def __init__(self, vocab_size: int, signal_tokens: Mapping[str, int]):
        self.vocab_size = vocab_size
        self.signal_tokens = dict(signal_tokens)
        self._signal_ids: dict[str, range] = {}
        start = vocab_size
        for key, count in self.signal_tokens.items():
            self._signal_ids[key] = range(start, start + count)
            start += count
        self.num_signals = start - vocab_size
        self.placeholder_id = start

    @property
    def outputs(self) -> list[str]:
        """Output keys, in the order of their logits."""
        return list(self._signal_ids)

    def signal_ids(self, key: str) -> list[int]:
        """The ids of the signal tokens of one output, a whole span."""
        return list(self._signal_ids[key])

    def signal_rows(self, key: str) -> slice:
        """The rows of one output's tokens in a table float[R, D] of all signal tokens."""
        ids = self._signal_ids[key]
        return slice(ids.start - self.vocab_size, ids.stop - self.vocab_size)

    def logit_index(self, key: str) -> int:
        """The index among the logits [V + O] that begins a signal span of `key`."""
        return self.vocab_size + self.outputs.index(key)

    def output_of_logit(self, index: int) -> str | None:
        """The output whose signal span a logit begins, None for a text token."""
        return self.outputs[index - self.vocab_size] if index >= self.vocab_size else None

    def output_of_first_id(self, token_id: int) -> str | None:
        """The output whose signal span begins with this id, None for any other id."""
        for key, ids in self._signal_ids.items():
            if token_id == ids.start:
                return key
        return None
