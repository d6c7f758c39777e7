"""The order of training data: the global batch of a step is a pure function of (seed, step).

Shuffling and mixing happen on the global order and a process takes its part of it (a slice, or
what it is dealt), so training resumes at any step, on any number of processes, without a sampler's
state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmllm.data.protocol import DataSource
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

    def __init__(self, sources: Mapping[str, DataSource], seed: int):
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
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}  # the last one asked for, by source

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

    def _permutation(self, which: int, epoch: int) -> np.ndarray:
        if which not in self._epochs or self._epochs[which][0] != epoch:
            size = len(self.sources[self.names[which]])
            order = np.random.default_rng([self.seed, 1, which, epoch]).permutation(size)
            self._epochs[which] = epoch, order.astype(np.uint32)
        return self._epochs[which][1]


class LengthGroups:
    """The mixture's draws with those of like length together, where batches are padded.

    The draws of `window` steps are sorted by length and dealt in `slices` a step (one for each
    accumulation step), in an order drawn anew for every window: each slice is of one length, a
    step is of several. Still a pure function of (seed, step), whatever the number of processes.
    """

    def __init__(
        self, mixture: Mixture, length: Callable[[Draw], int], *, window: int, slices: int
    ):
        self.mixture = mixture
        self.length = length
        self.window = window
        self.slices = slices

    def batch(self, step: int, batch_size: int) -> list[Draw]:
        """The global batch of a step, slice after slice."""
        number, place = divmod(step, self.window)
        return self._steps(number, batch_size)[place]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as the mixture's
    def _steps(self, number: int, batch_size: int) -> list[list[Draw]]:
        first = number * self.window
        draws = [
            draw
            for step in range(first, first + self.window)
            for draw in self.mixture.batch(step, batch_size)
        ]
        draws.sort(key=self.length)
        size = batch_size // self.slices
        parts = [draws[start : start + size] for start in range(0, len(draws), size)]
        order = np.random.default_rng([self.mixture.seed, 3, number]).permutation(len(parts))
        return [
            [draw for index in order[start : start + self.slices] for draw in parts[index]]
            for start in range(0, len(parts), self.slices)
        ]


def balance_by_length(
    draws: Sequence[Draw], parts: int, length: Callable[[Draw], int]
) -> list[list[Draw]]:
    """As many draws for each part and about as many tokens: the longest first, each to the part
    that has the fewest so far and still has room. Of equals the first comes first, so that all
    who deal the same draws find the same."""
    room = len(draws) // parts
    assert len(draws) == room * parts
    dealt: list[list[Draw]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    sized = [(length(draw), draw) for draw in draws]
    for size, draw in sorted(sized, key=lambda pair: pair[0], reverse=True):
        least = min((p for p in range(parts) if len(dealt[p]) < room), key=tokens.__getitem__)
        dealt[least].append(draw)
        tokens[least] += size
    return dealt
