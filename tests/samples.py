"""Small media of one value each, by which tests recognise them."""

from __future__ import annotations

import numpy as np

from mmllm.conversation import Audio, Image, Video


def picture(value: int = 0, **fields) -> Image:
    return Image.from_numpy(np.full((4, 4, 3), value, np.uint8), **fields)


def sound(value: float = 0.0, **fields) -> Audio:
    return Audio.from_numpy(np.full((1, 32), value, np.float32), 16_000, **fields)


def clip(value: int = 0, **fields) -> Video:
    return Video.from_numpy(np.full((3, 4, 4, 3), value, np.uint8), 8, **fields)
