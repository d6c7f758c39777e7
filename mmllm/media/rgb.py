"""Pillow's images of any mode as RGB with 8 bits per channel.

Legend: H x W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmllm.errors import MediaError

if TYPE_CHECKING:
    from PIL import Image as PILImage

STRIP_PIXELS = 1 << 22
"""Pixels that are converted at once, to limit the memory of intermediate copies."""


def to_rgb(picture: PILImage.Image) -> np.ndarray:
    """Convert to uint8[H, W, 3]: transparency is blended onto white, grey of more than 8 bits is
    scaled (Pillow would clip it)."""
    if picture.mode.startswith(("I", "F")):
        return _deep_grey(picture)
    width, height = picture.size
    array = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        array[top:bottom] = _strip(picture.crop((0, top, width, bottom)))
    return array


def to_mask(picture: PILImage.Image) -> np.ndarray | None:
    """Return where a picture is more transparent than not, as uint8[H, W, 3], white on black; None
    if it has no transparency at all, as a format or as a colour."""
    if not picture.has_transparency_data:
        return None
    alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    return np.where(alpha < 128, np.uint8(255), np.uint8(0))[..., None].repeat(3, axis=-1)


def _strip(strip: PILImage.Image) -> np.ndarray:
    """Convert a strip of an image of 8 bits per channel to uint8[H, W, 3]."""
    from PIL import Image as PILImage

    if not strip.has_transparency_data:
        return np.asarray(strip.convert("RGB"))
    clear = strip.info.get("transparency")
    if strip.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        # Pillow reduces 16-bit channels to the upper 8 bits, but not the transparent colour.
        strip.info["transparency"] = tuple(value >> 8 for value in clear)
    if strip.mode == "La":
        strip = strip.convert("LA")
    layer = strip.convert("RGBA")
    white = PILImage.new("RGBA", layer.size, "white")
    return np.asarray(PILImage.alpha_composite(white, layer).convert("RGB"))


def _deep_grey(picture: PILImage.Image) -> np.ndarray:
    """Convert grey of 16- or 32-bit integers or floats to uint8[H, W, 3], scaled by its range."""
    values = np.asarray(picture)
    if not np.isfinite(values).all():
        raise MediaError("the image holds values that are not numbers (NaN or infinity)")
    scale = 1 / 257 if picture.mode.startswith("I;16") else _scale(picture.mode, values.max())
    clear = picture.info.get("transparency")
    array = np.empty((*values.shape, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        part = values[top : top + rows]
        grey = (part * np.float64(scale)).clip(0, 255).round().astype(np.uint8)
        if isinstance(clear, int):
            grey[part == clear] = 255
        array[top : top + rows] = grey[..., None]
    return array


def _scale(mode: str, largest: float) -> float:
    """Return the factor that scales 32-bit grey to 0 … 255: values are in [0, 1] (floats only) or
    have 8, 16 or more bits."""
    if mode == "F" and largest <= 1:
        return 255.0
    if largest <= 255:
        return 1.0
    return 1 / 257 if largest <= 65535 else 255 / float(largest)
