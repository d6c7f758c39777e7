"""Plain text for the loss `kl`, which keeps the LLM's predictions close to those before training.

Like conversations, the windows of a step are a pure function of (seed, step).
Legend: W windows of a step, S tokens of a window.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmllm.data.sources import read_rows
from mmllm.data.text_fields import check_text
from mmllm.errors import ConfigError, RowError

logger = logging.getLogger(__name__)


def _texts(file: str) -> list[str]:
    """Return the texts of a file's rows; rows without a valid text are skipped with a warning."""
    rows, _ = read_rows(file, None, "stage.kl")
    texts, first = [], ""
    for index in range(len(rows)):
        try:
            text = rows[index].get("text")
            check_text(text, "`text`")
            texts.append(text)
        except RowError as error:
            first = first or f"{index}: {error}"
    if not texts:
        raise ConfigError(
            f'stage.kl.file: {file}: expected rows {{"text": "…"}}; the first is {first}'
        )
    if first:
        logger.warning(
            "stage.kl.file: %s: %d of %d rows are left out, the first is %s",
            file,
            len(rows) - len(texts),
            len(rows),
            first,
        )
    return texts


class TextCorpus:
    """The texts of a file, tokenized and cut into windows.

    Args:
        file: a JSON or JSONL file of rows {"text"}.
        encode: the tokenizer, text -> ids.
        length: tokens S of a window.
        batch_size: windows W of a step.
        seed: determines the order of the windows.

    Raises:
        ConfigError: no texts, or none of `length` tokens.
    """

    def __init__(
        self,
        file: str,
        encode: Callable[[str], Sequence[int]],
        *,
        length: int,
        batch_size: int,
        seed: int,
    ):
        self.batch_size, self.seed = batch_size, seed
        windows = []
        for text in _texts(file):
            ids = encode(text)
            windows += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        if not windows:
            raise ConfigError(f"stage.kl.length: no text of {file} has {length} tokens; lower it")
        self.windows = torch.tensor(windows)

    def batch(self, step: int) -> Tensor:
        """Return the windows of a step over all processes: int[W, S]."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = [self._order(number // len(self.windows)) for number in numbers]
        places = [number % len(self.windows) for number in numbers]
        return self.windows[[int(o[p]) for o, p in zip(chosen, places, strict=True)]]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 3, epoch]).permutation(len(self.windows))
