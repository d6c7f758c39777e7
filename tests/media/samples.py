"""Arrays and files that media tests share."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image as PILImage

MARK = {"model": "mini", "seed": 7, "prompt": "a <red> & 'blue' é"}


def gradient(height: int = 24, width: int = 40) -> np.ndarray:
    """Smooth, and different at each corner: lossy formats keep it, flips show."""
    y, x = np.mgrid[0:height, 0:width]
    colours = [x * 255 / (width - 1), y * 255 / (height - 1), 128 + 0 * x]
    return np.stack(colours, axis=-1).astype(np.uint8)


def steps(count: int = 12, height: int = 32, width: int = 48) -> np.ndarray:
    """A clip whose frame i is all of value 20 * i."""
    values = np.arange(count, dtype=np.uint8) * 20
    return np.broadcast_to(values[:, None, None, None], (count, height, width, 3)).copy()


def tone(seconds: float = 1.0, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)[None]


def png(picture: PILImage.Image, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def many_frames(num: int = 5000, side: int = 2000) -> bytes:
    """A GIF of some 100 kB that takes minutes to look through: a pixel changes in each frame."""
    canvas, changed = (PILImage.new("P", (side, side)) for _ in range(2))
    changed.putpixel((side // 2, side // 2), 1)
    file = io.BytesIO()
    canvas.save(file, "GIF", save_all=True, append_images=[changed], duration=100, loop=0)
    whole = file.getvalue()
    second = whole.rindex(b"\x21\xf9\x04")  # its graphic control extension
    return whole[:second] + whole[second:-1] * (num - 1) + b";"
