"""What data asks of others: a source of conversations, and a provider of frozen features."""

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
            rng: decides what may vary from visit to visit, such as the prompt.

        Raises:
            MediaError: the row is no conversation; training skips and counts it.
        """
        ...

    def name(self, index: int) -> str:
        """Return what reports call this item."""
        ...


class FeatureProvider(Protocol):
    """Computes or looks up what a batch needs from frozen encoders and decoders."""

    def input_media(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor | None]:
        """Return `samples`, or `features` and `feature_mask`, of M >= 1 media of encoder `key`."""
        ...

    def targets(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor]:
        """Return the caption embeddings of M >= 1 media of decoder `key`, by tensor name."""
        ...

    def latents(self, key: str, media: Sequence[Medium]) -> Tensor | None:
        """Return the latents of M >= 1 media of decoder `key`; None without a denoising loss."""
        ...
