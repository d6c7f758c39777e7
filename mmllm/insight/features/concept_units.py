"""Which unit (a feature, an axis, a component) stands for a thing in every modality?

A unit is chosen for each concept on training exemplars, by the modality at which it is worst, and
measured on held-out ones: how well does it tell exemplars of the concept from those of the others?

Legend: E exemplars, U units, C concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Exemplar:
    """One medium or word in a context.

    Attributes:
        concept: what it is.
        modality: "image", "audio", "video" or "text".
        held_out: whether it is measured on, rather than chosen on.
    """

    concept: str
    modality: str
    held_out: bool


@dataclass(frozen=True)
class ConceptUnit:
    """The unit that was chosen for a concept.

    Attributes:
        concept: the concept.
        unit: index of the unit.
        auroc: modality -> area under the ROC curve on held-out exemplars.
    """

    concept: str
    unit: int
    auroc: dict[str, float]

    @property
    def worst(self) -> float:
        """The smallest area of all modalities."""
        return min(self.auroc.values())


def concept_units(
    values: Tensor, exemplars: Sequence[Exemplar], modalities: Sequence[str]
) -> list[ConceptUnit]:
    """Choose a unit for each concept and measure it.

    Args:
        values: float[E, U], how strongly each unit is active.
        exemplars: what they are.
        modalities: those that a unit has to serve; a concept without training and held-out
            exemplars of one of them is left out.
    """
    concepts = sorted({exemplar.concept for exemplar in exemplars})
    areas: dict[tuple[str, bool], Tensor] = {}
    for modality in modalities:
        for held_out in (False, True):
            rows = [
                index
                for index, each in enumerate(exemplars)
                if (each.modality, each.held_out) == (modality, held_out)
            ]
            labels = [concepts.index(exemplars[row].concept) for row in rows]
            areas[modality, held_out] = auroc(values[rows], labels, len(concepts))
    trained = torch.stack([areas[modality, False] for modality in modalities])  # [M, C, U]
    chosen = []
    for number, concept in enumerate(concepts):
        own = trained[:, number]
        measured = {m: areas[m, True][number] for m in modalities}
        if own.isnan().any() or any(area.isnan().any() for area in measured.values()):
            continue
        # Where several units are equally good at their worst, the mean decides.
        unit = int((own.min(dim=0).values + 1e-3 * own.mean(dim=0)).argmax())
        auroc_by_modality = {m: float(area[unit]) for m, area in measured.items()}
        chosen.append(ConceptUnit(concept, unit, auroc_by_modality))
    return chosen


def auroc(values: Tensor, labels: Sequence[int], num_labels: int) -> Tensor:
    """Area under the ROC curve of every unit as a detector of every label, against all others: the
    probability that an exemplar of the label has the larger value; ties count half.

    Args:
        values: float[E, U].
        labels: int[E].
        num_labels: C.

    Returns:
        float32[C, U]; NaN for a label that no exemplar has, or all.
    """
    columns = values.float().t().contiguous()  # [U, E]
    ordered = columns.sort(dim=-1).values
    below = torch.searchsorted(ordered, columns, right=False)
    not_above = torch.searchsorted(ordered, columns, right=True)
    ranks = (below + not_above + 1).double() / 2  # [U, E], ties share their mean rank
    member = torch.nn.functional.one_hot(torch.tensor(labels), num_labels).double()  # [E, C]
    num = member.sum(dim=0)  # [C]
    others = len(labels) - num
    above = (ranks @ member) - num * (num + 1) / 2  # [U, C]
    return (above / (num * others)).t().float()


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean, and the 95 % interval of the percentile bootstrap.

    Args:
        values: one of each concept.
        seed: of the resampling.
    """
    array = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = array[rng.integers(len(array), size=(2000, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(array.mean()), float(low), float(high)
