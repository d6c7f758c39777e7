"""The order of training data: the global batch of a step is a pure function of (seed, step).

Datasets are shuffled and mixed in one global order, of which each process takes its part (a slice,
or the result of `balance_by_length`). Training can therefore resume at any step, on any number of
processes, without a sampler state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmllm.data.protocol import DataSource
from mmllm.errors import ConfigError

_BLOCK = 1000
"""Number of draws in which every dataset gets exactly its share, so shares are exact to 0.1 %."""


@dataclass(frozen=True)
class Draw:
    """One item of a global batch.

    Attributes:
        source: the name of the dataset.
        index: the row.
        seed: the seed of the row's random variation, such as its phrasing.
    """

    source: str
    index: int
    seed: int


class Mixture:
    """A mixture of datasets in proportion to their shares; `draw` has random access.

    Args:
        sources: the datasets by name.
        seed: determines the order.

    Raises:
        ConfigError: no dataset, or shares that are negative or all zero.
    """

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
        # The permutation of the epoch that was used last, by dataset.
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}

    def draw(self, number: int) -> Draw:
        """Return a draw by its number.

        Args:
            number: step * batch_size + place in the batch.
        """
        block, place = divmod(number, _BLOCK)
        order = self._order(block)
        which = int(order[place])
        visit = block * int(self.counts[which]) + int((order[:place] == which).sum())
        name = self.names[which]
        epoch, position = divmod(visit, len(self.sources[name]))
        index = int(self._permutation(which, epoch)[position])
        return Draw(name, index, seed=number)

    def batch(self, step: int, batch_size: int) -> list[Draw]:
        """Return the global batch of a step, the same on every process.

        Args:
            step: the optimizer step, from 0.
            batch_size: conversations of all processes and micro-batches together.
        """
        return [self.draw(step * batch_size + place) for place in range(batch_size)]

    def rng(self, draw: Draw) -> np.random.Generator:
        """Return the generator of an item's random variation (prompt, augmentation)."""
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
    """Batches of a mixture with draws of similar length grouped, to reduce padding.

    The draws of `window` steps are sorted by length and cut into slices, `slices` per step (one per
    accumulation step), in a random order per window: the items of a slice have similar lengths, the
    slices of a step do not. A batch is still a pure function of (seed, step), for any number of
    processes.

    Args:
        mixture: the draws.
        length: returns the number of tokens of a draw.
        window: number of steps whose draws are sorted together.
        slices: number of slices per step.
    """

    def __init__(
        self, mixture: Mixture, length: Callable[[Draw], int], *, window: int, slices: int
    ):
        self.mixture = mixture
        self.length = length
        self.window = window
        self.slices = slices

    def batch(self, step: int, batch_size: int) -> list[Draw]:
        """Return the global batch of a step, slice after slice.

        Args:
            step: the optimizer step, from 0.
            batch_size: conversations of all processes and micro-batches together.
        """
        number, place = divmod(step, self.window)
        return self._steps(number, batch_size)[place]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as its training too
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
    """Split draws into parts of equally many draws and about equally many tokens.

    The draws are assigned longest first, each to the part that has the fewest tokens so far and is
    not full. Ties go to the first, so that all processes compute the same split.

    Args:
        draws: a multiple of `parts`.
        parts: number of parts.
        length: returns the number of tokens of a draw.
    """
    share = len(draws) // parts
    assert len(draws) == share * parts
    dealt: list[list[Draw]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    sized = [(length(draw), draw) for draw in draws]
    for size, draw in sorted(sized, key=lambda pair: pair[0], reverse=True):
        least = min((p for p in range(parts) if len(dealt[p]) < share), key=tokens.__getitem__)
        dealt[least].append(draw)
        tokens[least] += size
    return dealt
