"""Which features of a dictionary are active more or less often in another model: the adapted one
against its base.

Legend: N positions, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.insight.activations import Activations
from mmllm.insight.dictionary.autoencoder import SparseAutoencoder

_CHUNK = 8192


@dataclass(frozen=True)
class FeatureChange:
    """A feature in two models, at the same positions.

    Attributes:
        feature: its number.
        density: kind of position -> share of positions at which it is active, before and after.
        activation: kind of position -> mean activation, positions where it is inactive included,
            before and after.
    """

    feature: int
    density: Mapping[str, tuple[float, float]]
    activation: Mapping[str, tuple[float, float]]

    @property
    def size(self) -> float:
        """Mean over kinds of the absolute change of the mean activation."""
        changes = [abs(after - before) for before, after in self.activation.values()]
        return sum(changes) / len(changes)

    def __str__(self) -> str:
        kinds = (
            f"{kind} {before:.1%} -> {after:.1%}" for kind, (before, after) in self.density.items()
        )
        return f"feature {self.feature}: active at {', '.join(kinds)}"


def feature_changes(
    dictionary: SparseAutoencoder, before: Activations, after: Activations, num: int
) -> list[FeatureChange]:
    """The features that change most from one model to another.

    Args:
        dictionary: of the states' site, of one of both.
        before: states of one model.
        after: those of the other, at the same positions.
        num: features at most.

    Returns:
        From the largest `FeatureChange.size`.
    """
    kinds = list(after.counts())
    means = [
        [_means(dictionary, acts, kind) for kind in kinds] for acts in (before, after)
    ]  # [2, kinds] of density float[F], activation float[F]
    activation = torch.stack([torch.stack([own for _, own in row]) for row in means])
    sizes = (activation[1] - activation[0]).abs().mean(dim=0)  # [F]

    def change(feature: int) -> FeatureChange:
        tables = [
            {
                kind: (float(means[0][at][which][feature]), float(means[1][at][which][feature]))
                for at, kind in enumerate(kinds)
            }
            for which in range(2)
        ]
        return FeatureChange(feature, *tables)

    return [change(feature) for feature in sizes.topk(min(num, len(sizes))).indices.tolist()]


@torch.inference_mode()
def _means(dictionary: SparseAutoencoder, acts: Activations, kind: str) -> tuple[Tensor, Tensor]:
    """Density and mean activation at positions of a kind, without massive states: float32[F]."""
    states = acts.states[acts.of_kind(kind) & ~acts.is_massive]
    density, activation = torch.zeros(2, dictionary.width)
    for chunk in states.split(_CHUNK):
        active = dictionary.encode(chunk)
        density += (active > 0).sum(dim=0)
        activation += active.sum(dim=0)
    return density / max(len(states), 1), activation / max(len(states), 1)
