"""A sparse autoencoder: states of a site as sparse sums of learned directions.

    f = activation((x - b_dec) W_enc + b_enc),   x^ = f W_dec + b_dec

Every row of W_dec has length 1, so that an activation has the unit of the states: it is the length
of what the feature adds. A transcoder predicts the states of another site instead of its own input,
whose mean it does not subtract. (Bricken et al. 2023; Dunefsky et al. 2024)

Legend: N positions, D width of the input site, E width of the output site, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Origin:
    """What the states were taken from that a dictionary was trained on.

    Attributes:
        model: fingerprint of the model (`Chat.fingerprint`).
        site: name of the site that it reads (mmllm.insight.sites).
        output_site: name of the site that it predicts; the same but for a transcoder.
        name: the model's name, for people.
    """

    model: str
    site: str
    output_site: str
    name: str = ""

    @property
    def is_transcoder(self) -> bool:
        """Whether another site is predicted than is read."""
        return self.site != self.output_site


class SparseAutoencoder(nn.Module):
    """A dictionary of F features for one site.

    A feature is active where its pre-activation exceeds its threshold (JumpReLU, the form that
    BatchTopK has after training too), or where it is among the k largest (TopK).
    """

    def __init__(
        self,
        d_in: int,
        width: int,
        origin: Origin,
        *,
        d_out: int | None = None,
        k: int | None = None,
    ):
        """
        Args:
            d_in: D.
            width: F.
            origin: the model and site of the states.
            d_out: E; None: D.
            k: features that are active at every position; None: thresholds decide.
        """
        super().__init__()
        self.origin, self.k = origin, k
        self.W_enc = nn.Parameter(torch.zeros(d_in, width))
        self.b_enc = nn.Parameter(torch.zeros(width))
        self.W_dec = nn.Parameter(torch.zeros(width, d_out or d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_out or d_in))
        self.threshold = nn.Parameter(torch.zeros(width))
        self.requires_grad_(False)

    @property
    def width(self) -> int:
        """F"""
        return len(self.W_dec)

    def __repr__(self) -> str:
        active = f"the {self.k} largest" if self.k else "thresholds"
        return f"SparseAutoencoder({self.origin.site!r}, {self.width:,} features, {active})"

    def pre_activations(self, states: Tensor) -> Tensor:
        """float[N, D] -> float32[N, F], before the activation function."""
        states = states.to(self.W_enc.dtype)
        if not self.origin.is_transcoder:
            states = states - self.b_dec
        return states @ self.W_enc + self.b_enc

    def encode(self, states: Tensor) -> Tensor:
        """Activations of all features: float[N, D] -> float32[N, F], at least 0."""
        return self.activate(self.pre_activations(states))

    def activate(self, pre: Tensor) -> Tensor:
        """Apply the activation function: float32[N, F] -> float32[N, F]."""
        if self.k is None:
            return pre.relu() * (pre > self.threshold)
        largest = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, largest.indices, largest.values.relu())

    def decode(self, features: Tensor) -> Tensor:
        """Reconstructed states: float32[N, F] -> float32[N, E]."""
        return features @ self.W_dec + self.b_dec

    def forward(self, states: Tensor) -> Tensor:
        """float[N, D] -> float32[N, E], the reconstruction."""
        return self.decode(self.encode(states))

    def direction(self, feature: int) -> Tensor:
        """What one unit of a feature adds to a state: float32[E] of length 1.

        Raises:
            ConfigError: there is no such feature.
        """
        if not 0 <= feature < self.width:
            raise ConfigError(
                f"feature {feature}: this dictionary has the features 0 to {self.width - 1}"
            )
        return self.W_dec[feature]

    def check_origin(self, model: str, *sites: str) -> None:
        """Refuse states of another model or site than the dictionary was trained on.

        Args:
            model: fingerprint of the model that is looked at.
            sites: the site that is read and, for a transcoder, the one that is predicted.

        Raises:
            CheckpointError: names both fingerprints, or both sites.
        """
        own = (self.origin.site, self.origin.output_site) if len(sites) > 1 else (self.origin.site,)
        if model != self.origin.model:
            raise CheckpointError(
                f"dictionary of {self.origin.site}: trained on the model {self.origin.model}"
                f"{f' ({self.origin.name})' if self.origin.name else ''}, but this model is "
                f"{model}; train one for it with `mmllm insight features`"
            )
        if sites and own != sites:
            raise CheckpointError(
                f"dictionary of the model {self.origin.model}: trained on {' -> '.join(own)}, but "
                f"these states are of {' -> '.join(sites)} (model {model}); look at the same site, "
                "or train one for it"
            )


def normalized_rows(matrix: Tensor) -> Tensor:
    """float[F, E] -> rows of length 1."""
    return torch.nn.functional.normalize(matrix, dim=-1)


def random_directions(count: int, width: int, generator: torch.Generator, **options: Any) -> Tensor:
    """Draw directions uniformly: float[count, width], of length 1.

    Args:
        count: how many.
        width: of the space.
        generator: source of randomness.
        **options: of torch.randn.
    """
    return normalized_rows(torch.randn(count, width, generator=generator, **options))
