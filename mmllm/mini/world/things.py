"""The things that scenes are made of: names, sprites and colours.

Sprites are the 3-D emoji of Microsoft's Fluent set (MIT), 112 x 112 pixels with an alpha channel.
A sprite in which one hue dominates can be recoloured.

Dimensions: S sprite side in pixels.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmllm import mini

DATA = mini.FOLDER / "data"
SPRITE = 112
"""Side of a sprite in pixels."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (355.0, 0.85, 0.85),
    "orange": (27.0, 0.90, 0.98),
    "yellow": (52.0, 0.85, 0.98),
    "green": (125.0, 0.72, 0.68),
    "blue": (217.0, 0.80, 0.88),
    "purple": (275.0, 0.62, 0.74),
    "pink": (330.0, 0.45, 1.00),
    "brown": (24.0, 0.62, 0.48),
    "black": (240.0, 0.10, 0.20),
    "white": (240.0, 0.03, 0.97),
}
"""Name -> hue in degrees, mean saturation and mean value of a recoloured sprite."""

UNPAINTED = ("person", "body")
"""Categories that keep the colours they have."""

_MIN_SATURATION = 0.2  # below it a pixel has no hue of its own
_HUE_WINDOW = 45.0  # degrees on either side of the dominant hue that are recoloured
_MIN_SHARE = 0.72  # of the coloured pixels, inside the window
_MIN_COVER = 0.40  # of all opaque pixels, inside the window


@dataclass(frozen=True)
class Thing:
    """One thing of the vocabulary."""

    id: str
    label: str
    caption: str
    """The label with its article: "a cat"."""
    plural: str
    countable: bool
    """Whether scenes may hold two, three or four of it."""
    synonyms: tuple[str, ...]
    """Other names in captions of training."""
    heldout_synonyms: tuple[str, ...]
    category: str
    emoji: str
    """Hexadecimal code points, joined by hyphens."""


@functools.cache
def things() -> dict[str, Thing]:
    """The vocabulary by id, in the order of things.json."""
    rows = json.loads((DATA / "things.json").read_text(encoding="utf-8"))
    names = ("synonyms", "heldout_synonyms")
    return {row["id"]: Thing(**row | {name: tuple(row[name]) for name in names}) for row in rows}


@functools.cache
def sprite(thing: str, colour: str | None = None) -> NDArray[np.float32]:
    """A thing's picture as premultiplied RGBA, float32[S, S, 4] in 0..1.

    Args:
        thing: An id.
        colour: One of COLOURS, or None for the colours it has.

    Raises:
        ValueError: If the sprite has no dominant hue to replace.
    """
    with Image.open(DATA / "things" / f"{thing}.webp") as file:
        pixels = (np.asarray(file.convert("RGBA")) / 255).astype(np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    if colour is not None:
        rgb = _recolour(thing, rgb, alpha[..., 0], colour)
    return np.concatenate([rgb * alpha, alpha], axis=-1)


@functools.cache
def colourable() -> tuple[str, ...]:
    """The ids of things with one dominant hue, in order."""
    return tuple(
        thing.id
        for thing in things().values()
        if thing.category not in UNPAINTED and _dominant_hue(thing.id) is not None
    )


@functools.cache
def _dominant_hue(thing: str) -> float | None:
    """Degrees, or None where no hue covers enough of the sprite."""
    pixels = sprite(thing)
    alpha = pixels[..., 3]
    opaque = alpha > 0.5
    rgb = pixels[opaque][:, :3] / alpha[opaque][:, None]
    hue, saturation, value = _hsv(rgb)
    weight = np.where((saturation > _MIN_SATURATION) & (value > 0.15), saturation, 0.0)
    if weight.sum() == 0:
        return None
    counts, _ = np.histogram(hue, bins=72, range=(0, 360), weights=weight)
    smooth = sum(np.roll(counts, shift) for shift in range(-3, 4))
    peak = float(np.argmax(smooth)) * 5 + 2.5
    inside = (_distance(hue, peak) < _HUE_WINDOW) & (weight > 0)
    share = weight[inside].sum() / weight.sum()
    cover = inside.mean()
    return peak if share >= _MIN_SHARE and cover >= _MIN_COVER else None


def _recolour(
    thing: str, rgb: NDArray[np.float32], alpha: NDArray[np.float32], colour: str
) -> NDArray[np.float32]:
    """The pixels near the dominant hue with the hue, mean saturation and mean value of a colour."""
    peak = _dominant_hue(thing)
    if peak is None:
        raise ValueError(f"{thing} has no dominant hue: it cannot be made {colour}")
    hue, saturation, value = _hsv(rgb)
    near = np.clip((_HUE_WINDOW + 15 - _distance(hue, peak)) / 15, 0, 1)
    near = near * np.clip((saturation - 0.08) / 0.12, 0, 1)
    core = (near > 0.5) & (alpha > 0.5)
    target_hue, target_saturation, target_value = COLOURS[colour]
    # Shading stays: saturation and value keep their contrast around the new mean.
    spread = np.clip(value - value[core].mean(), -0.5, 0.5)
    new_value = np.clip(target_value + spread * (0.55 if target_value > 0.9 else 0.8), 0.03, 1)
    ratio = saturation / max(float(saturation[core].mean()), 0.05)
    new_saturation = np.clip(target_saturation * np.clip(ratio, 0.5, 1.3), 0, 1)
    painted = _rgb(np.full_like(hue, target_hue), new_saturation, new_value)
    return (rgb + (painted - rgb) * near[..., None]).astype(np.float32)


def _distance(hue: NDArray[np.float32], peak: float) -> NDArray[np.float32]:
    """Degrees between hues, 0 to 180."""
    return np.abs((hue - peak + 180) % 360 - 180)


def _hsv(
    rgb: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """[..., 3] in 0..1 -> hue in degrees, saturation and value in 0..1, each [...]."""
    high, low = rgb.max(-1), rgb.min(-1)
    chroma = high - low
    safe = np.where(chroma > 0, chroma, 1)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(
        high == red,
        ((green - blue) / safe) % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return 60 * hue, chroma / np.where(high > 0, high, 1), high


def _rgb(
    hue: NDArray[np.float32], saturation: NDArray[np.float32], value: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The inverse of `_hsv`."""
    phase = np.stack([(offset + hue / 60) % 6 for offset in (5, 3, 1)], axis=-1)
    shape = np.clip(np.minimum(phase, 4 - phase), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * shape)
