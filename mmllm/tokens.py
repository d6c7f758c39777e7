"""Token ids beyond the tokenizer's: signal tokens of each output, and the place of input media.

With a vocabulary of V text tokens, ids V … V+R-1 are the signal tokens, output after output in
the order of the config; id V+R marks a position that an input medium's embedding fills. In the
head each output has one row only, "begin a run": a run once begun always completes, so its other
tokens are never predicted.
"""

from __future__ import annotations

from collections.abc import Mapping


class TokenSpace:
    """Which id means what, for V text tokens and the outputs' numbers of signal tokens."""

    def __init__(self, vocabulary: int, signal_tokens: Mapping[str, int]):
        self.vocabulary = vocabulary
        self.signal_tokens = dict(signal_tokens)
        self._runs: dict[str, range] = {}
        start = vocabulary
        for key, count in self.signal_tokens.items():
            self._runs[key] = range(start, start + count)
            start += count
        self.num_signals = start - vocabulary
        self.placeholder = start

    @property
    def outputs(self) -> list[str]:
        """Output keys, in the order of their rows in the head."""
        return list(self._runs)

    def run(self, key: str) -> list[int]:
        """The ids of one whole signal run."""
        return list(self._runs[key])

    def head_row(self, key: str) -> int:
        """The row of the logits [V + outputs] that begins a run of `key`."""
        return self.vocabulary + self.outputs.index(key)

    def output_of_row(self, row: int) -> str | None:
        """The output that a row of the logits begins, None for a text token."""
        return self.outputs[row - self.vocabulary] if row >= self.vocabulary else None

    def output_of_id(self, token: int) -> str | None:
        """The output whose run begins with this id, None for any other id."""
        for key, run in self._runs.items():
            if token == run.start:
                return key
        return None
