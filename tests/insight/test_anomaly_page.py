"""The page of anomalies: what is odd is bright, on large and small screens."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmllm.conversation import Medium
from mmllm.insight.anomaly import Anomaly
from mmllm.insight.anomaly_page import write_anomaly_page
from tests.samples import clip, picture, sound

SPOT = torch.zeros(8, 8)
SPOT[6:, :2] = 1.0
BAND = torch.zeros(20, 6)
BAND[:, 5] = 1.0


def anomaly(heat: torch.Tensor, score: float = 1.0) -> Anomaly:
    return Anomaly(score, 0.02 if score > 1 else 0.5, heat, surprisal=3.25)


def images_of(file: Path) -> list[np.ndarray]:
    """The pictures of a page, in order; of a clip the last frame."""
    found = []
    for content in re.findall(r'src="data:image/webp;base64,(.*?)"', file.read_text("utf-8")):
        picture = PILImage.open(io.BytesIO(base64.b64decode(content)))
        picture.seek(getattr(picture, "n_frames", 1) - 1)
        found.append(np.asarray(picture.convert("RGB")).astype(int))
    return found


@pytest.mark.parametrize(
    ("medium", "heat", "bright"),
    [
        (picture(40), SPOT, (slice(-40, None), slice(0, 40))),
        (sound(0.2), BAND, (slice(0, 8), slice(None))),
        (clip(80), torch.stack([torch.zeros(8, 8), SPOT]), (slice(-40, None), slice(0, 40))),
    ],
    ids=["picture", "high band of a sound", "last frame of a clip"],
)
def test_what_is_odd_is_bright(
    medium: Medium, heat: torch.Tensor, bright: tuple[slice, slice], folder: Path
) -> None:
    write_anomaly_page(folder / "page.html", "Odd", {"a": (medium, anomaly(heat))})
    plain, mapped = images_of(folder / "page.html")
    assert plain.shape == mapped.shape
    where = np.zeros(mapped.shape[:2], dtype=bool)
    where[bright] = True
    assert mapped[where].mean() > mapped[~where].mean() + 40
    if not isinstance(medium, type(sound(0.2))):  # nothing lies over the rest
        assert np.abs(mapped[:40, -40:] - plain[:40, -40:]).max() < 24


def test_the_oddest_comes_first_and_a_page_needs_no_other_file(
    folder: Path, browse: Callable[..., Any]
) -> None:
    file = folder / "page.html"
    found = {
        "usual.png": (picture(10), anomaly(SPOT / 9, 0.5)),
        "a <very> long name of a sound that is odd.ogg": (sound(0.2), anomaly(BAND, 2.0)),
        "clip.mp4": (clip(80), anomaly(torch.stack([SPOT, SPOT / 2]), 1.0)),
    }
    write_anomaly_page(file, "Odd", found)
    text = file.read_text(encoding="utf-8")
    assert all(source.startswith("data:") for source in re.findall(r'src="(.*?)"', text))
    names = re.findall(r"<h2>(.*?)</h2>", text)
    assert names == [
        "a &lt;very&gt; long name of a sound that is odd.ogg",
        "clip.mp4",
        "usual.png",
    ]
    assert text.count('class="odd"') == 1
    assert "-log p 3.2" in text
    for width in (1280, 390):
        page = browse(width, 800)
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".pair img").count() == 6
