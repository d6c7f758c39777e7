"""Plain text that no conversation needs: what the loss `retain` holds the LLM to.

Windows are drawn like conversations are: those of a step are a pure function of (seed, step).
Legend: W windows of a step, S tokens of a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmllm.data.sources import read_rows
from mmllm.errors import ConfigError

if TYPE_CHECKING:
    from mmllm.config import RetainConfig
    from mmllm.llm.causal_lm import LanguageModel


class PlainText:
    """See mmllm.config.RetainConfig."""

    def __init__(self, config: RetainConfig, llm: LanguageModel, seed: int):
        rows, _ = read_rows(config.file, None, "stage.retain")
        size, self.batch_size, self.seed = config.length, config.batch_size, seed
        if not all(isinstance(row.get("text"), str) for row in rows):
            raise ConfigError(f'stage.retain.file: {config.file}: expected rows {{"text": "…"}}')
        windows = []
        for row in rows:
            ids = llm.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            windows += [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
        if not windows:
            raise ConfigError(
                f"stage.retain.length: no text of {config.file} has {size} tokens; lower it"
            )
        self.windows = torch.tensor(windows)

    def batch(self, step: int) -> Tensor:
        """The windows of a step over all processes: int[W, S]."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = [self._order(number // len(self.windows)) for number in numbers]
        places = [number % len(self.windows) for number in numbers]
        return self.windows[[int(o[p]) for o, p in zip(chosen, places, strict=True)]]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 3, epoch]).permutation(len(self.windows))
