"""Thresholds of a dictionary, set so that a given number of features is active at a position.

BatchTopK has no threshold while it trains: it keeps the B k largest activations of a batch, and the
smallest one that was kept stands in for that afterwards (Bussmann et al. 2024). On states that a
dictionary was not trained on features are active more often, and more often at some kinds of
positions than at others, so that thresholds are taken there.

Legend: N positions, D width, F features.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mmllm.insight.dictionary.activation import kth_largest
from mmllm.insight.dictionary.autoencoder import SparseAutoencoder

_MAX_POSITIONS = 16_384
"""Of more states, evenly spaced ones are used."""
CHUNK = 2048
"""States that are encoded at once."""


@torch.no_grad()
def calibrate(dictionary: SparseAutoencoder, states: Tensor, k: int) -> SparseAutoencoder:
    """Multiply all thresholds by the factor at which k features are active at a position, on
    average over the states.

    Args:
        dictionary: thresholds of 0 count as 1; one that keeps the k largest of each position is
            returned as it is.
        states: float[N, D], N >= 1.
        k: L0.

    Returns:
        A copy with other thresholds.
    """
    if dictionary.k is not None:
        return dictionary
    states = states[:: -(-len(states) // _MAX_POSITIONS)]
    num, largest = k * len(states), []
    thresholds = torch.where(dictionary.threshold > 0, dictionary.threshold, 1.0)
    for chunk in states.split(CHUNK):
        ratios = (dictionary.pre_activations(chunk) / thresholds).flatten()
        largest.append(ratios.topk(min(num + 1, len(ratios)), sorted=False).values)
    factor = kth_largest(torch.cat(largest), num)
    calibrated = copy.deepcopy(dictionary)
    calibrated.threshold.copy_(thresholds * factor)
    return calibrated
