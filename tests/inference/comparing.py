"""Comparisons of replies."""

from __future__ import annotations

import numpy as np

from mmllm.inference.replies import Reply


def same(one: Reply, other: Reply) -> bool:
    """Whether ids, text and media are equal, to the byte."""
    return (
        one.ids == other.ids
        and [type(part) for part in one.message.parts]
        == [type(part) for part in other.message.parts]
        and one.text == other.text
        and all(
            np.array_equal(a.to_numpy(), b.to_numpy())
            for a, b in zip(one.media, other.media, strict=True)
        )
    )


def close(one: Reply, other: Reply) -> bool:
    """Whether ids are equal, and media but for rounding."""
    return one.ids == other.ids and all(
        np.abs(a.to_numpy().astype(float) - b.to_numpy()).max()
        <= (1e-4 if a.modality == "audio" else 1)
        for a, b in zip(one.media, other.media, strict=True)
    )
