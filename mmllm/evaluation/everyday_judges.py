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
from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.errors import AssetError
from mmllm.evaluation.clip_judge import ClipJudge, MovingThing, shows_clip
from mmllm.evaluation.everyday import MediumJudge, scene_of
from mmllm.evaluation.scene_judge import Found, SceneJudge, find_ground, shows
from mmllm.evaluation.soundscape_judge import SoundscapeJudge
from mmllm.mini.world.clips import FRAMES, Clip
from mmllm.mini.world.rendering import SIDE
from mmllm.mini.world.scenes import Scene
from mmllm.mini.world.sounds import RATE, SAMPLES, Layout, Soundscape

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

    def is_of(self, medium: Medium, described: Scene) -> bool:
        """Whether an image shows a scene: everything that it says, and nothing else."""
        pixels = _pixels(medium)
        ground = described.ground in (None, find_ground(pixels))
        return ground and shows(self._scenes.find(pixels[None])[0], described).everything

    def names(self, medium: Medium) -> set[str]:
        """See MediumJudge."""
        return {item.thing for item in self._scenes.find(_pixels(medium)[None])[0]}


class FindsMotions(Protocol):
    """The one method of `ClipJudge` that judging a video calls."""

    def find(self, clips: NDArray[np.uint8]) -> Sequence[Sequence[MovingThing]]:
        """The things of each clip, uint8[B, F, H, W, 3]."""
        ...


class VideoJudge:
    """Judges videos by the things and motions that a judge of clips finds in them.

    Args:
        clips: finds things and motions.
    """

    def __init__(self, clips: FindsMotions):
        self._clips = clips

    def shows(self, medium: Medium, rule: Mapping[str, Any]) -> bool:
        """See MediumJudge: `thing`, `motion` and perhaps `colour`."""
        return any(
            (item.thing, item.motion) == (rule["thing"], rule["motion"])
            and rule.get("colour") in (None, item.colour)
            for item in self._found(medium)
        )

    def is_of(self, medium: Medium, described: Clip) -> bool:
        """Whether a video shows a clip: everything that it says, and nothing else."""
        return shows_clip(self._found(medium), described).everything

    def names(self, medium: Medium) -> set[str]:
        """See MediumJudge."""
        return {item.thing for item in self._found(medium)}

    def _found(self, medium: Medium) -> Sequence[MovingThing]:
        assert isinstance(medium, Video)
        return self._clips.find(medium.sample_frames(FRAMES)[None])[0]


class NamesSounds(Protocol):
    """The one method of `SoundscapeJudge` that judging audio calls."""

    def find(self, waves: NDArray[np.float32]) -> Sequence[Soundscape]:
        """What sounds in each recording, float32[B, S]."""
        ...


class AudioJudge:
    """Judges audio by what a judge of soundscapes names in it.

    Args:
        soundscapes: names sounds.
    """

    def __init__(self, soundscapes: NamesSounds):
        self._soundscapes = soundscapes

    def shows(self, medium: Medium, rule: Mapping[str, Any]) -> bool:
        """See MediumJudge: `sounds`, `order`, `level`, `pitch` and `repeated`."""
        found = self._found(medium)
        names, asked = [voice.sound for voice in found.voices], list(rule["sounds"])
        order = rule.get("order")
        if order != "sequence":
            names.sort()
            asked.sort()
        if names != asked or (order and found.layout != _LAYOUTS[order]):
            return False
        return (
            all(rule.get("level") in (None, voice.loudness) for voice in found.voices)
            and all(rule.get("pitch") in (None, voice.pitch) for voice in found.voices)
            and all(voice.times > 1 or not rule.get("repeated") for voice in found.voices)
        )

    def is_of(self, medium: Medium, described: Soundscape) -> bool:
        """Whether audio is a soundscape. Loudness and pitch that it leaves open may be any."""
        found = self._found(medium)
        ours, theirs = list(described.voices), list(found.voices)
        if described.layout == "together":
            ours.sort(key=lambda voice: voice.sound)
            theirs.sort(key=lambda voice: voice.sound)
        return (found.layout, len(ours)) == (described.layout, len(theirs)) and all(
            (one.sound, one.times) == (other.sound, other.times)
            and one.loudness in (None, other.loudness)
            and one.pitch in (None, other.pitch)
            for one, other in zip(ours, theirs, strict=True)
        )

    def names(self, medium: Medium) -> set[str]:
        """See MediumJudge."""
        return {voice.sound for voice in self._found(medium).voices}

    def _found(self, medium: Medium) -> Soundscape:
        assert isinstance(medium, Audio)
        wave = medium.resample(RATE).to_numpy()[0, :SAMPLES]
        return self._soundscapes.find(np.pad(wave, (0, SAMPLES - len(wave)))[None])[0]


_LAYOUTS: dict[str, Layout] = {"sequence": "then", "together": "together"}


def _pixels(medium: Medium) -> NDArray[np.uint8]:
    """An image at the size of a rendering, uint8[P, P, 3]."""
    assert isinstance(medium, Image)
    return np.asarray(medium.to_pil().resize((SIDE, SIDE), PILImage.Resampling.LANCZOS))


_LOADERS: dict[str, tuple[str, Callable[[Path], MediumJudge]]] = {
    "image": ("scene", lambda file: ImageJudge(SceneJudge.load(file))),
    "audio": ("soundscape", lambda file: AudioJudge(SoundscapeJudge.load(file))),
    "video": ("clip", lambda file: VideoJudge(ClipJudge.load(file))),
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
