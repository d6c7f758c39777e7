"""The protocols of datasets (DataSource) and of providers of frozen features (FeatureProvider)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from mmllm.conversation import Medium, Message


class DataSource(Protocol):
    """A dataset of numbered conversations.

    Attributes:
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
        """Compute, or look up, what an input projection takes.

        Args:
            key: the encoder's modality in the config.
            media: M >= 1 media of that modality.

        Returns:
            Either `samples`, the preprocessed media, to be encoded in the training step; or
            `features` float[M, L, C] and `feature_mask`, bool[M, L] or None, of the encoder.
        """
        ...

    def targets(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor]:
        """Compute, or look up, the caption embeddings that an output projection is to match.

        Args:
            key: the decoder's modality in the config.
            media: M >= 1 media of that modality, with captions.

        Returns:
            The decoder's condition by tensor name, each of M rows.
        """
        ...

    def latents(self, key: str, media: Sequence[Medium]) -> Tensor | None:
        """Compute, or look up, the latents that the denoising loss adds noise to, and those of
        references.

        Args:
            key: the decoder's modality in the config.
            media: M >= 1 media of that modality.

        Returns:
            One row a medium; None if the stage has no denoising loss.
        """
        ...
