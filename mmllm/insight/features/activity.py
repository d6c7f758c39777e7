"""At which positions each feature of a dictionary is active, and how strongly.

Legend: N positions, D width, F features, A pairs of a position and a feature active there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmllm.insight.activations import KINDS, NONE, Activations
from mmllm.insight.dictionary.autoencoder import SparseAutoencoder

_CHUNK = 8192


@dataclass(frozen=True)
class FeatureActivity:
    """The non-zero activations of all features, sorted by feature and then from the strongest.

    Attributes:
        acts: the positions.
        rows: int32[A], positions.
        values: float32[A], activations.
        starts: int64[F + 1]: those of feature f are starts[f] to starts[f + 1].
    """

    acts: Activations
    rows: np.ndarray
    values: np.ndarray
    starts: np.ndarray

    @classmethod
    @torch.inference_mode()
    def measure(cls, dictionary: SparseAutoencoder, acts: Activations) -> FeatureActivity:
        """Encode all positions; massive states count as inactive.

        Args:
            dictionary: the dictionary.
            acts: states of its site.
        """
        rows, features, values = [], [], []
        for start in range(0, len(acts), _CHUNK):
            active = dictionary.encode(acts.states[start : start + _CHUNK])
            active[acts.is_massive[start : start + _CHUNK]] = 0
            row, feature = active.nonzero(as_tuple=True)
            rows.append((row + start).int().numpy())
            features.append(feature.int().numpy())
            values.append(active[row, feature].numpy())
        row, feature, value = (np.concatenate(part) for part in (rows, features, values))
        order = np.lexsort((-value, feature))
        starts = np.searchsorted(feature[order], np.arange(dictionary.width + 1))
        return cls(acts, row[order], value[order], starts)

    @property
    def width(self) -> int:
        """F"""
        return len(self.starts) - 1

    def of(self, feature: int, kind: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions and activations of a feature, from the strongest.

        Args:
            feature: its index.
            kind: of positions; None: all.
        """
        where = slice(self.starts[feature], self.starts[feature + 1])
        rows, values = self.rows[where], self.values[where]
        if kind is not None:
            of_kind = self.acts.kinds.numpy()[rows] == KINDS.index(kind)
            rows, values = rows[of_kind], values[of_kind]
        return rows, values

    def density(self, feature: int) -> float:
        """Share of positions at which a feature is active."""
        return float(self.starts[feature + 1] - self.starts[feature]) / max(len(self.acts), 1)

    def density_by_kind(self, feature: int) -> dict[str, float]:
        """The same of the positions of each kind that there is."""
        return {
            kind: len(self.of(feature, kind)[0]) / count
            for kind, count in self.acts.counts().items()
        }

    def strongest(self, feature: int, kind: str, num: int) -> list[tuple[int, float]]:
        """The strongest positions of a kind, one a conversation and one a medium.

        Args:
            feature: its index.
            kind: of positions.
            num: how many at most.

        Returns:
            (position, activation) of each.
        """
        found: list[tuple[int, float]] = []
        seen = set()
        for row, value in zip(*self.of(feature, kind), strict=True):
            medium = self.acts.medium(int(row)) if kind != "text" else None
            name = str(medium.source) if medium is not None and medium.has_data else ""
            key = name or int(self.acts.items[int(row)])
            if key not in seen:
                seen.add(key)
                found.append((int(row), float(value)))
            if len(found) == num:
                break
        return found


def shared_concepts(activity: FeatureActivity, num: int = 12) -> list[dict[str, tuple[str, float]]]:
    """Of each feature and kind, the concept that its strongest positions are most often of, and the
    share of them that are.

    Args:
        activity: of the dictionary.
        num: how many of the strongest positions are looked at.

    Returns:
        For each feature, kind -> (concept, share); kinds at which it is never active are absent.
    """
    names: Sequence[str] = activity.acts.concept_names
    concepts = activity.acts.concepts.numpy()
    found: list[dict[str, tuple[str, float]]] = []
    for feature in range(activity.width):
        by_kind = {}
        for kind in activity.acts.counts():
            rows = activity.of(feature, kind)[0][:num]
            named = Counter(int(number) for number in concepts[rows] if number != NONE)
            if named:
                number, count = named.most_common(1)[0]
                by_kind[kind] = names[number], count / max(len(rows), num // 2)
        found.append(by_kind)
    return found
