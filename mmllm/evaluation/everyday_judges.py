"""The judges of everyday requests: what is seen in media, compared with a request's rules.

The judges of scenes, clips and soundscapes find what media hold. Their weights are in
`mmllm/mini/judges/`, each with its card; nothing in mini uses them or their features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from mmllm import mini
from mmllm.conversation import Image, Medium
from mmllm.errors import AssetError
from mmllm.evaluation.everyday import MediumJudge, scene_of
from mmllm.evaluation.scene_judge import Found, SceneJudge, find_ground, shows
from mmllm.mini.world.rendering import SIDE

FOLDER = mini.FOLDER / "judges"


class FindsThings(Protocol):
    """The one method of `SceneJudge` that judging an image calls."""

    def find(self, images: NDArray[np.uint8]) -> Sequence[Sequence[Found]]:
        """The things of each image, uint8[B, P, P, 3]."""
        ...


class ImageJudge:
    """Judges images by the things that a judge of scenes finds in them.

    Args:
        scenes: finds things.
    """

    def __init__(self, scenes: FindsThings):
        self._scenes = scenes

    def shows(self, medium: Medium, rule: Mapping[str, Any]) -> bool:
        """See MediumJudge: `groups`, `layout`, `ground` or `without`."""
        pixels = _pixels(medium)
        found = self._scenes.find(pixels[None])[0]
        if "groups" not in rule:
            return not {item.thing for item in found} & set(rule["without"])
        verdict = shows(found, scene_of(rule))
        in_place = verdict.places or not rule.get("layout")
        ground = rule.get("ground") in (None, find_ground(pixels))
        return verdict.things and verdict.colours and verdict.sizes and in_place and ground

    def names(self, medium: Medium) -> set[str]:
        """See MediumJudge."""
        return {item.thing for item in self._scenes.find(_pixels(medium)[None])[0]}


def _pixels(medium: Medium) -> NDArray[np.uint8]:
    """An image at the size of a rendering, uint8[P, P, 3]."""
    assert isinstance(medium, Image)
    return np.asarray(medium.to_pil().resize((SIDE, SIDE), PILImage.Resampling.LANCZOS))


_LOADERS: dict[str, tuple[str, Callable[[Path], MediumJudge]]] = {
    "image": ("scene", lambda file: ImageJudge(SceneJudge.load(file))),
}
"""Modality -> name of its judge, and how its file becomes one."""


def load_judges(folder: Path = FOLDER) -> dict[str, MediumJudge]:
    """The judges by modality whose weights are there.

    Args:
        folder: holds `scene.safetensors` and so on.

    Raises:
        AssetError: there is none.
    """
    judges = {}
    for modality, (name, load) in _LOADERS.items():
        file = folder / f"{name}.safetensors"
        if file.is_file():
            judges[modality] = load(file)
    if not judges:
        raise AssetError(
            f"everyday: {folder} has the weights of no judge; train them with "
            "`python -m tools.mini.world.judge` of the repository (docs/mini.md, Scenes)"
        )
    return judges
