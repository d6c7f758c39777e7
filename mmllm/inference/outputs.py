"""What the LLM generates for one sequence: token ids and signal spans, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor

FinishReason = Literal["end", "length", "stop", ""]
"""Why a sequence ended: an end token, the limit of tokens, a stop string; "" while it goes on."""


@dataclass
class SignalSpan:
    """One complete run of signal tokens.

    Attributes:
        key: the output key.
        states: float[W + K, D], their hidden states, behind those of W words of the reply that the
            output projection reads too (0 for most).
    """

    key: str
    states: Tensor


Piece: TypeAlias = int | SignalSpan
"""A text token's id, or a signal span."""


@dataclass
class GenerationOutput:
    """The output of one sequence.

    Attributes:
        pieces: token ids and signal spans, in order.
        finish: why the sequence ended.
        num_cached: positions of the prompt that came from a key-value cache.
    """

    pieces: list[Piece] = field(default_factory=list[Piece])
    finish: FinishReason = ""
    num_cached: int = 0

    @property
    def ids(self) -> list[int]:
        """Ids of the text tokens, without the signal spans."""
        return [piece for piece in self.pieces if isinstance(piece, int)]

    @property
    def spans(self) -> list[SignalSpan]:
        """The signal spans, in order."""
        return [piece for piece in self.pieces if isinstance(piece, SignalSpan)]


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode token ids to text, without special tokens and without cleaning up spaces.

    Args:
        tokenizer: the language model's tokenizer.
        ids: text tokens.
    """
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
