"""The border round what encoders and decoders make of one medium."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmllm.conversation import Medium
from mmllm.errors import MediaError
from mmllm.media.files import brief
from mmllm.media.limits import check_size


@contextmanager
def preparing(medium: Medium, where: str) -> Iterator[None]:
    """Whatever the block raises about the medium that it prepares is a MediaError.

    Arrays are held to the limits of files. Autocast is off: samples have the precision of the
    medium, whatever the model computes in.
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
    except Exception as error:  # libraries' preprocessors raise whatever odd shapes lead to
        raise MediaError(
            f"{where}: {medium!r} cannot be prepared ({type(error).__name__}: {brief(error)})"
        ) from error
