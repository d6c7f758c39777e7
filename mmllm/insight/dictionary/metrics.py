"""What a dictionary is worth: variance explained, active and dead features, loss recovered.

Every measure is taken of a reconstruction, a function of states, so that baselines are measured
alike: principal components, the plain axes, and a dictionary whose decoder stays random.

Legend: N positions, D width, F features, C conversations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.data.batch import collate
from mmllm.data.protocol import FeatureProvider
from mmllm.data.rendering import UNSUPERVISED, Rendered
from mmllm.insight.activations import Activations
from mmllm.insight.dictionary.autoencoder import SparseAutoencoder
from mmllm.insight.hooks import Edit, edit
from mmllm.model import AnyToAny

Reconstruct = Callable[[Tensor], Tensor]
"""States float[N, D] -> float32[N, D]."""

_RESAMPLES = 1000
_CHUNK = 8192
_MAX_POSITIONS = 2048


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, by resampling the n conversations it was measured on."""

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray, seed: int = 0) -> Estimate:
    """sum(numerators) / sum(denominators), with the interval of the percentile bootstrap.

    Args:
        numerators: float[C].
        denominators: float[C].
        seed: of the resampling.
    """
    count = len(numerators)
    if not count or not denominators.sum():
        return Estimate(math.nan, math.nan, math.nan, count)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (weights @ numerators) / (weights @ denominators)
    low, high = np.nanquantile(values, [0.025, 0.975])
    value = numerators.sum() / denominators.sum()
    return Estimate(float(value), float(low), float(high), count)


class PrincipalComponents:
    """Reconstruction by the first k principal components: dense, but as many numbers as a sparse
    code of k features.

    Args:
        states: float[N, D] that they are computed of.
        k: number of components.
    """

    def __init__(self, states: Tensor, k: int):
        states = states.float()
        self.mean = states.mean(dim=0)
        centred = states - self.mean
        _, vectors = torch.linalg.eigh(centred.t() @ centred)
        self.components = vectors[:, -k:]

    def __call__(self, states: Tensor) -> Tensor:
        """See Reconstruct."""
        centred = states.float() - self.mean
        return centred @ self.components @ self.components.t() + self.mean


class PlainAxes:
    """Reconstruction by the k coordinates of each state that are furthest from the mean.

    Args:
        states: float[N, D] whose mean is taken.
        k: number of coordinates.
    """

    def __init__(self, states: Tensor, k: int):
        self.mean, self.k = states.float().mean(dim=0), k

    def __call__(self, states: Tensor) -> Tensor:
        """See Reconstruct."""
        centred = states.float() - self.mean
        chosen = centred.abs().topk(self.k, dim=-1).indices
        return torch.zeros_like(centred).scatter(-1, chosen, centred.gather(-1, chosen)) + self.mean


@torch.inference_mode()
def variance_explained(reconstruct: Reconstruct, acts: Activations) -> Estimate:
    """1 - |x - x^|^2 / |x - mean|^2, where the mean is that of the given positions.

    Massive states are left out.

    Args:
        reconstruct: what is measured.
        acts: the positions.
    """
    keep = ~acts.is_massive
    states, items = acts.states[keep], acts.items[keep].long()
    mean = states.float().mean(dim=0) if len(states) else states.float()
    numbers, places = items.unique(return_inverse=True)
    errors, totals = torch.zeros(2, len(numbers), dtype=torch.float64)
    for chunk, at in zip(states.split(_CHUNK), places.split(_CHUNK), strict=True):
        chunk = chunk.float()
        error = (chunk - reconstruct(chunk)).square().sum(dim=-1)
        errors.index_add_(0, at, error.double())
        totals.index_add_(0, at, (chunk - mean).square().sum(dim=-1).double())
    return ratio_of_sums((totals - errors).numpy(), totals.numpy())


@torch.inference_mode()
def density(dictionary: SparseAutoencoder, states: Tensor) -> Tensor:
    """Share of positions at which each feature is active: float32[F]. Its sum is L0, the mean
    number of active features; a feature whose share is 0 is dead.

    Args:
        dictionary: the dictionary.
        states: float[N, D].
    """
    counts = torch.zeros(dictionary.width)
    for chunk in states.split(_CHUNK):
        counts += (dictionary.encode(chunk) > 0).sum(dim=0)
    return counts / max(len(states), 1)


# --- loss recovered -----------------------------------------------------------------------------


@dataclass(frozen=True)
class SplicedLosses:
    """Summed token NLL and number of supervised tokens of each conversation: float[C] each."""

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """NLL of a token, in natural units."""
        return float(self.nll.sum() / self.tokens.sum())


@torch.inference_mode()
def losses(
    model: AnyToAny,
    conversations: Sequence[Rendered],
    features: FeatureProvider,
    site: str,
    reconstruct: Reconstruct | None = None,
    *,
    max_norm: float = math.inf,
    on_progress: Callable[[int], object] = lambda _: None,
) -> SplicedLosses:
    """The text loss of replies, with the states of a site replaced by their reconstruction.

    Args:
        model: the model.
        conversations: rendered by its renderer.
        features: gives the encoders' outputs.
        site: name of the site.
        reconstruct: what replaces its states; None replaces nothing.
        max_norm: states that are longer stay as they are.
        on_progress: called with the number of conversations after each batch.
    """
    pack = model.llm.supports_prefix_packing
    nll, tokens = [], []
    size = max(1, _MAX_POSITIONS // max(map(len, conversations), default=1))
    for start in range(0, len(conversations), size):
        group = conversations[start : start + size]
        batch = collate(group, features, model.batch_layout, pack=pack, targets=False)
        batch = batch.to(model.device)
        with edit(model, site, _splice(reconstruct, max_norm)) if reconstruct else nullcontext():
            hidden = model.hidden(batch).flatten(0, 1)
        values = model.llm.token_nll(hidden[batch.target_indices], batch.labels)
        counts = [sum(label != UNSUPERVISED for label in each.labels) for each in group]
        nll += [part.sum().item() for part in values.double().cpu().split(counts)]
        tokens += counts
        on_progress(len(group))
    return SplicedLosses(np.array(nll), np.array(tokens, dtype=float))


def loss_recovered(
    clean: SplicedLosses, spliced: SplicedLosses, ablated: SplicedLosses
) -> Estimate:
    """(L_ablated - L_spliced) / (L_ablated - L_clean): 1 if the reconstruction costs nothing, 0 if
    it is worth no more than the mean state.

    Args:
        clean: without a replacement.
        spliced: with the reconstruction.
        ablated: with the mean state at every position.
    """
    return ratio_of_sums(ablated.nll - spliced.nll, ablated.nll - clean.nll)


def _splice(reconstruct: Reconstruct, max_norm: float) -> Edit:
    def edited(states: Tensor, _: Any) -> Tensor:
        keep = states.float().norm(dim=-1, keepdim=True) > max_norm
        return torch.where(keep, states, reconstruct(states).to(states.dtype))

    return edited
