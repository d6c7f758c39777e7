"""States whose features are known, to see how many of them a dictionary finds.

Reconstruction is no proof of understanding: dictionaries explain most of the variance of such
states while they find a small part of the features (arXiv:2602.14111). Each state is a sparse sum
of F directions in D < F dimensions; how often features are active follows Zipf's law.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.insight.dictionary.autoencoder import Origin, normalized_rows, random_directions
from mmllm.insight.dictionary.training import Sample

RECOVERED = 0.9
"""Cosine from which a feature counts as found."""
_SEEDS = 1_000_000_007
"""Features are not drawn with the seeds that dictionaries are initialised with."""


@dataclass(frozen=True)
class KnownFeatures:
    """Features that states are made of.

    Attributes:
        directions: float32[F, D], of length 1.
        frequency: float32[F], the probability that each is active.
    """

    directions: Tensor
    frequency: Tensor

    @classmethod
    def draw(cls, count: int, width: int, active: float, seed: int = 0) -> KnownFeatures:
        """Draw features.

        Args:
            count: F.
            width: D.
            active: features that are active in a state, on average.
            seed: of the draw.
        """
        generator = torch.Generator().manual_seed(_SEEDS + seed)
        weights = 1 / torch.arange(1, count + 1).float().sqrt()
        frequency = (active * weights / weights.sum()).clamp(max=0.5)
        return cls(random_directions(count, width, generator), frequency)

    def states(self, num: int, seed: int) -> Tensor:
        """Draw states: float32[num, D]. Active features have strengths from 0.5 to 1.5.

        Args:
            num: how many.
            seed: of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        size = num, len(self.directions)
        active = torch.rand(size, generator=generator) < self.frequency
        strengths = 0.5 + torch.rand(size, generator=generator)
        return (active * strengths) @ self.directions

    def sample(self, batch_size: int) -> Sample:
        """Batches for `train_dictionary`."""

        def batch(step: int) -> tuple[Tensor, Tensor]:
            states = self.states(batch_size, seed=1 + step)
            return states, states

        return batch

    @property
    def origin(self) -> Origin:
        """A name for dictionaries of these states."""
        return Origin("synthetic", "synthetic", "synthetic")

    def recovered(self, decoder: Tensor) -> Tensor:
        """The largest cosine of each feature with a row of a decoder: float32[F].

        Args:
            decoder: float[_, D].
        """
        return (self.directions @ normalized_rows(decoder.float()).t()).max(dim=1).values
