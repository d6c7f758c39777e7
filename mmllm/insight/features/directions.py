"""Directions that put one thing in place of another, made of few features of a dictionary.

Of each thing the features are taken that are most active in its states, compared with those of all
others. The direction removes those of the one thing and adds those of the other:

    v = sum_f a_f(wanted) W_dec[f] - sum_g a_g(own) W_dec[g]

Legend: R replies, K signal tokens of a medium, D width, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.insight.dictionary.autoencoder import SparseAutoencoder
from mmllm.insight.steering import Direction


@dataclass(frozen=True)
class ConceptFeatures:
    """The features that stand for a thing.

    Attributes:
        features: their numbers, from the one that tells it best from other things.
        activations: float32[K, num], their mean activation at each of its positions.
        vectors: float32[K, D], what they add there.
    """

    features: tuple[int, ...]
    activations: Tensor
    vectors: Tensor

    def instead_of(self, other: ConceptFeatures, site: str) -> Direction:
        """The direction that removes the features of another thing and adds these.

        Args:
            other: the thing that is there.
            site: that of the dictionary.
        """
        return Direction(site, self.vectors - other.vectors)


@torch.inference_mode()
def concept_features(
    dictionary: SparseAutoencoder, states: Mapping[str, Sequence[Tensor]], num: int = 5
) -> dict[str, ConceptFeatures]:
    """The features of each thing whose mean activation exceeds that at all other things most.

    Args:
        dictionary: of the states' site.
        states: thing -> float[K, D] of each of R replies that make it, for two things or more.
        num: features of a thing.
    """
    means = {
        thing: torch.stack([dictionary.encode(each) for each in own]).mean(dim=0)  # [K, F]
        for thing, own in states.items()
    }
    total = torch.stack(list(means.values())).sum(dim=0).mean(dim=0)  # [F]
    found = {}
    for thing, mean in means.items():
        own = mean.mean(dim=0)
        lead = own - (total - own) / max(len(means) - 1, 1)
        chosen = lead.topk(num).indices
        activations = mean[:, chosen]
        vectors = activations @ dictionary.W_dec[chosen]
        found[thing] = ConceptFeatures(tuple(chosen.tolist()), activations, vectors)
    return found
