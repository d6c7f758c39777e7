"""The protocols of datasets (DataSource) and of providers of frozen features (FeatureProvider)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from mmllm.conversation import Medium, Message


class DataSource(Protocol):
    """A dataset of numbered conversations.

    share: its weight in a mixture.
    """

    share: float

    def __len__(self) -> int: ...

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """Return conversation `index`; its media are named, not opened.

        Args:
            index: from 0 to `len(self) - 1`.
            rng: draws what varies from epoch to epoch, such as the prompt.

        Raises:
            MediaError: the row is no valid conversation; training skips and counts it.
        """
        ...

    def name(self, index: int) -> str:
        """Return the name of a row for reports."""
        ...


class FeatureProvider(Protocol):
    """A provider of the outputs of frozen encoders and decoders, computed or cached."""

    def input_media(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor | None]:
        """Return `samples`, or `features` and `feature_mask`, of M >= 1 media of encoder `key`."""
        ...

    def targets(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor]:
        """Return the caption embeddings of M >= 1 media of decoder `key`, by tensor name."""
        ...

    def latents(self, key: str, media: Sequence[Medium]) -> Tensor | None:
        """Return the latents of M >= 1 media of decoder `key`; None without a denoising loss."""
        ...
