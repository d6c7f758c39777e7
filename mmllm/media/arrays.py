"""Validation of decoded media given as arrays; every error says how to convert the array.

Legend: H x W pixels, F frames, C channels, S samples.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from mmllm.errors import MediaError, quoted

MAX_SAMPLE_RATE = 1_000_000
"""Maximum sample rate in Hz; no recorder has more."""
_MAX_CHANNELS = 64
_MAX_AMPLITUDE = 2.0
"""Largest magnitude accepted for samples in [-1, 1]: resampling and mixing exceed 1 slightly."""


def check_pixels(array: Any, layout: str, where: str) -> np.ndarray:
    """Return an array of uint8 RGB pixels unchanged if it is valid.

    Args:
        array: the value that was given.
        layout: "H, W, 3" for an image, "F, H, W, 3" for a video.
        where: the class named in messages, such as "Image".

    Raises:
        MediaError: another dtype or shape; the message names the remedy.
    """
    array = _as_array(array, f"{where}.from_numpy")
    ndim = layout.count(",") + 1
    if array.ndim == ndim and array.dtype == np.uint8 and array.shape[-1] == 3 and array.size:
        return array
    remedy = ""
    if array.dtype != np.uint8:
        remedy = "; scale it to 0 … 255 and cast it: .astype(np.uint8)"
    elif array.ndim == ndim and array.shape[-1] == 4:
        remedy = "; lay what is transparent on a background, as Image.from_pil(...) does"
    elif array.ndim == ndim and array.shape[-3] == 3:
        remedy = "; move the channels to the end: np.moveaxis(array, -3, -1)"
    elif array.ndim == ndim - 1 or (array.ndim == ndim and array.shape[-1] == 1):
        remedy = "; of grey make three equal channels: np.repeat(array, 3, axis=-1)"
    raise MediaError(
        f"{where}.from_numpy: expected a non-empty uint8[{layout}], RGB, got "
        f"{array.dtype}{list(array.shape)}{remedy}"
    )


def check_samples(array: Any) -> np.ndarray:
    """Return valid audio samples as float32[C, S] in [-1, 1], with slightly larger values clipped.

    Args:
        array: the value that was given, float32[C, S] or float32[S].

    Raises:
        MediaError: another dtype, shape or range; the message names the remedy.
    """
    where = "Audio.from_numpy: "
    array = np.atleast_2d(_as_array(array, "Audio.from_numpy"))
    if array.ndim != 2 or array.dtype != np.float32 or not array.size:
        remedy = ""
        if np.issubdtype(array.dtype, np.integer):
            remedy = "; scale it to [-1, 1]: int16 is .astype(np.float32) / 32768"
        elif array.dtype != np.float32:
            remedy = "; cast it: .astype(np.float32)"
        raise MediaError(
            f"{where}expected a non-empty float32[C, S] or float32[S], got "
            f"{array.dtype}{list(array.shape)}{remedy}"
        )
    channels, samples = array.shape
    if channels > min(samples, _MAX_CHANNELS):
        raise MediaError(
            f"{where}expected float32[C, S], got {channels} channels of {samples} samples; "
            "transpose it: array.T"
        )
    lowest, highest = float(array.min()), float(array.max())
    if not np.isfinite([lowest, highest]).all():
        raise MediaError(f"{where}expected finite values, got NaN or infinity among them")
    amplitude = max(-lowest, highest)
    if amplitude > _MAX_AMPLITUDE:
        raise MediaError(
            f"{where}expected values in [-1, 1], got up to {amplitude:.6g}; divide by the largest "
            "value of the format, such as 32768 for 16 bits"
        )
    return array if amplitude <= 1 else array.clip(-1, 1)


def check_sample_rate(rate: Any) -> int:
    """Return a sample rate in Hz as an int; any type of number is accepted. Raises MediaError for
    one that is not a positive integer of at most MAX_SAMPLE_RATE."""
    if not is_number(rate) or rate != int(rate) or not 0 < rate <= MAX_SAMPLE_RATE:
        raise MediaError(
            f"Audio.from_numpy: expected a sample_rate of at most {MAX_SAMPLE_RATE}, in whole Hz > "
            f"0, got {quoted(rate)}"
        )
    return int(rate)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite real number and not a bool."""
    return (
        isinstance(value, int | float | np.number | Fraction)
        and not isinstance(value, bool)
        and bool(np.isfinite(float(value)))
    )


def _as_array(data: Any, where: str) -> np.ndarray:
    """Convert data to an array. Raises MediaError: lists may be ragged, and torch tensors may
    require a gradient, be on a device or have a dtype that numpy lacks."""
    try:
        return np.asarray(data)
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = "; of a tensor of torch give .detach().float().cpu().numpy()"
        raise MediaError(
            f"{where}: expected an array, got {type(data).__name__} ({error})"
            f"{remedy if hasattr(data, 'detach') else ''}"
        ) from error
