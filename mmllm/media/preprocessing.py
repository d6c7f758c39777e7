"""The context in which encoders and decoders preprocess media."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

import numpy as np

from mmllm.errors import MediaError
from mmllm.media.files import brief
from mmllm.media.limits import check_size


class _Medium(Protocol):
    modality: ClassVar[str]

    @property
    def array(self) -> np.ndarray | None: ...


@contextmanager
def preprocessing(medium: _Medium, where: str) -> Iterator[None]:
    """Convert any exception inside the block, which preprocesses `medium`, into a MediaError.

    Arrays are subject to the same limits as files. Autocast is disabled in the block, so that
    samples do not depend on the precision of the model.

    Args:
        medium: an Image, Audio or Video.
        where: the preprocessor's name in messages.

    Raises:
        MediaError: the medium exceeds the limits, or preprocessing fails.
    """
    import torch

    if medium.array is not None and medium.modality != "audio":
        height, width = medium.array.shape[-3:-1]
        check_size(repr(medium), width, height)
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    except MediaError:
        raise
    except Exception as error:  # libraries' preprocessors raise anything for odd shapes
        raise MediaError(
            f"{where}: {medium!r} cannot be prepared ({type(error).__name__}: {brief(error)})"
        ) from error
