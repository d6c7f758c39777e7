"""The order of training data: the global batch of a step is a pure function of (seed, step).

Shuffling and mixing happen on the global order and a process takes its slice of it, so training
resumes at any step, on any number of processes, without a sampler's state.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmllm.data.sources import Source
from mmllm.errors import ConfigError

_BLOCK = 1000
"""Draws in which every source gets exactly its share (so shares are exact to 0.1 %)."""


@dataclass(frozen=True)
class Draw:
    """One item of one global batch: item `index` of `source`; `seed` decides its variation."""

    source: str
    index: int
    seed: int


class Mixture:
    """Several sources by share. `draw(number)` answers for any number in O(block)."""

    def __init__(self, sources: Mapping[str, Source], seed: int):
        if not sources:
            raise ConfigError("stage.data: expected at least one dataset")
        self.sources = dict(sources)
        self.names = list(sources)
        self.seed = seed
        shares = np.array([source.share for source in sources.values()], dtype=np.float64)
        if (shares < 0).any() or shares.sum() <= 0:
            raise ConfigError(f"stage.data: shares must be positive, got {shares.tolist()}")
        exact = shares / shares.sum() * _BLOCK
        counts = np.floor(exact).astype(int)
        rest = _BLOCK - counts.sum()
        counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
        self.counts = counts

    def draw(self, number: int) -> Draw:
        """Draw `number` = step * batch_size + place in the batch."""
        block, place = divmod(number, _BLOCK)
        order = self._order(block)
        which = int(order[place])
        visit = block * int(self.counts[which]) + int((order[:place] == which).sum())
        name = self.names[which]
        epoch, position = divmod(visit, len(self.sources[name]))
        index = int(self._permutation(which, epoch)[position])
        return Draw(name, index, seed=number)

    def batch(self, step: int, batch_size: int) -> list[Draw]:
        """The global batch of a step."""
        return [self.draw(step * batch_size + place) for place in range(batch_size)]

    def rng(self, draw: Draw) -> np.random.Generator:
        """The generator that decides an item's variation (which prompt, which augmentation)."""
        return np.random.default_rng([self.seed, 2, draw.seed])

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a mixture lives as long as its training
    def _order(self, block: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, block]).permutation(
            np.repeat(np.arange(len(self.counts)), self.counts)
        )

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def _permutation(self, which: int, epoch: int) -> np.ndarray:
        size = len(self.sources[self.names[which]])
        return np.random.default_rng([self.seed, 1, which, epoch]).permutation(size)
