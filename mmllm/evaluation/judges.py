"""Independent judges of generated media: which real item lies nearest, in features of their own?

The gallery holds one real item of every trained concept. Nothing in `mini` uses these features:
- pictures: EfficientNet-Lite1 (mini sees with Lite0) on a 2 x 2 grid, and a coarse layout of
  colours; a clip is the mean of three of its frames;
- sounds: statistics of MFCC and log-mel frames and the spectrum of their loudness in time,
  whitened by the covariance within concepts over the training takes (Hatch et al. 2006, WCCN).
How far a judge can be trusted is measured: `validate` shows it real items that were altered.

Legend: M media, D features, F frames, T spectrogram frames, S samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageEnhance
from torch import Tensor

from mmllm import media, mini
from mmllm.conversation import MEDIA, Audio, Image, Medium, Video
from mmllm.data.sources import read_text

Features = Callable[[Sequence[Medium]], np.ndarray]
"""Media -> float[M, D]; the dot product of two rows is their likeness."""

RATE = 16_000
SIDE = 64
"""What mini makes: the gallery is judged at that rate and size, or sharpness would tell."""

_COLOURS = 0.2
"""Weight of the layout of colours against the network's features."""
_FRAMES = 3
_SHRINKAGE = 0.2
_FLOOR = 0.1
"""Added to mel power before the logarithm (peak amplitude 1): faint noise does not count."""
_GALLERY = {"image": {"style": "fluent-3d"}, "video": {}, "audio": {"take": 0}}
"""Which of a concept's training items stands in the gallery."""


@dataclass(frozen=True)
class Validation:
    """How often a judge finds the concept of real, altered items."""

    n: int
    top1: float
    top5: float


class Judge:
    """Ranks the concepts of one modality by likeness to their real items."""

    def __init__(self, features: Features, gallery: Mapping[str, Medium]):
        """`gallery`: concept -> its real item."""
        self.concepts = list(gallery)
        self.gallery = dict(gallery)
        self._features = features
        self._known = features(list(gallery.values()))  # [concepts, D]

    def rank(self, made: Sequence[Medium]) -> list[list[str]]:
        """For each medium all concepts, nearest first."""
        if not made:
            return []
        likeness = self._features(made) @ self._known.T  # [M, concepts]
        order = np.argsort(-likeness, axis=1, kind="stable")
        return [[self.concepts[index] for index in row] for row in order]

    def validate(self, altered: Sequence[tuple[str, Medium]]) -> Validation:
        """The figures for (concept, real but altered item)."""
        ranked = self.rank([medium for _, medium in altered])
        found = [(c in row[:1], c in row[:5]) for (c, _), row in zip(altered, ranked, strict=True)]
        top1, top5 = np.mean(found, axis=0)
        return Validation(len(found), float(top1), float(top5))


def build_judge(modality: str, *, data: Path | None = None, num: int | None = None) -> Judge:
    """The judge of one modality over mini's data; `num` takes the first concepts only.

    Raises AssetError when the network of the picture judge cannot be had.
    """
    data = data or mini.locate("data")
    items = [item for item in read_items(data, modality) if item["split"] == "train"]
    wanted = _GALLERY[modality].items()
    chosen = [item for item in items if all(item[key] == value for key, value in wanted)][:num]
    gallery = {item["concept"]: open_item(data, item) for item in chosen}
    if modality != "audio":
        return Judge(PictureFeatures([*gallery.values()]), gallery)
    takes: dict[str, list[Medium]] = {}
    for item in items:
        if item["concept"] in gallery:
            takes.setdefault(item["concept"], []).append(open_item(data, item))
    return Judge(SoundFeatures(list(takes.values())), gallery)


def altered_items(
    modality: str, judge: Judge, *, data: Path | None = None, num: int = 200, seed: int = 0
) -> list[tuple[str, Medium]]:
    """(concept, item) to validate a judge with: its gallery mirrored, shifted, rescaled, darker
    or brighter; sounds moved in time, softer and noisy, and one take that the judge has not seen.
    """
    rng = np.random.default_rng(seed)
    last = len(judge.concepts) - 1
    chosen = [judge.concepts[round(i)] for i in np.linspace(0, last, min(num, last + 1))]
    altered = [(concept, _ALTER[modality](judge.gallery[concept], rng)) for concept in chosen]
    if modality == "audio":
        data = data or mini.locate("data")
        unseen: dict[str, Medium] = {}
        for item in read_items(data, modality):
            if item["split"] == "heldout_take" and item["concept"] in chosen:
                unseen.setdefault(item["concept"], open_item(data, item))
        altered += unseen.items()
    return altered


def motion(clip: Medium) -> float:
    """Mean absolute difference of neighbouring frames, 0 to 1."""
    frames = clip.to_numpy().astype(np.float32) / 255  # [F, H, W, 3]
    return float(np.abs(np.diff(frames, axis=0)).mean()) if len(frames) > 1 else 0.0


def read_items(data: Path, modality: str) -> list[dict[str, Any]]:
    """The rows of one modality in the lists of items and of sounds."""
    items = json.loads(read_text(data / "items.json.gz"))
    items += json.loads(read_text(data / "sounds.json.gz"))["items"]
    return [item for item in items if item["modality"] == modality]


def open_item(data: Path, item: Mapping[str, Any]) -> Medium:
    return MEDIA[item["modality"]](source=data / item["file"])


# --- pictures and clips -------------------------------------------------------------------------


class PictureFeatures:
    """Pictures or clips -> float[M, D]: two blocks of unit length, the second weighted less."""

    def __init__(self, real: Sequence[Medium]):
        """`real` tells which colours are usual where: that the page is white is not news."""
        self._usual = np.stack([_colours(_frames(medium)) for medium in real]).mean(axis=0)

    def __call__(self, media: Sequence[Medium]) -> np.ndarray:
        rows = []
        for start in range(0, len(media), 8):
            clips = [_frames(medium) for medium in media[start : start + 8]]
            with torch.inference_mode():
                tokens = _network().encode([Image.from_pil(p) for clip in clips for p in clip])
            seen = tokens.tokens.float().flatten(1).numpy()  # [pictures, 4 * 1280]
            for clip in clips:
                shapes, seen = seen[: len(clip)].mean(axis=0), seen[len(clip) :]
                colours = _colours(clip) - self._usual
                rows.append(np.concatenate([_unit(shapes), _COLOURS**0.5 * _unit(colours)]))
        return np.stack(rows)


@cache
def _network() -> Any:
    from mmllm.encoders.efficientnet import EfficientNetConfig, build

    return build(
        EfficientNetConfig(weights="mini:efficientnet-lite1", variant="lite1", grid=2, size=128)
    )


def _frames(medium: Medium) -> list[PILImage.Image]:
    """A picture, or three frames of a clip, at 64 px."""
    if isinstance(medium, Video):
        pictures = [PILImage.fromarray(f) for f in media.sample_frames(medium, _FRAMES)]
    else:
        assert isinstance(medium, Image)
        pictures = [medium.to_pil()]
    return [p.resize((SIDE, SIDE), PILImage.Resampling.LANCZOS) for p in pictures]


def _colours(pictures: Sequence[PILImage.Image]) -> np.ndarray:
    """Mean colours of 8 x 8 fields: float[192]."""
    fields = [p.resize((8, 8), PILImage.Resampling.BOX) for p in pictures]
    return np.mean([np.asarray(f, dtype=np.float32).ravel() for f in fields], axis=0)


def _alter_picture(picture: Medium, rng: np.random.Generator) -> Image:
    return Image.from_pil(_alteration(rng)(_frames(picture)[0]))


def _alter_clip(clip: Medium, rng: np.random.Generator) -> Video:
    """Every frame in the same way; the loop begins elsewhere."""
    assert isinstance(clip, Video)
    alter = _alteration(rng)
    frames = [np.asarray(alter(picture.resize((SIDE, SIDE)))) for picture in clip.to_pil()]
    frames = np.roll(np.stack(frames), int(rng.integers(len(frames))), axis=0)
    return Video.from_numpy(frames, clip.fps or 8.0)


def _alteration(rng: np.random.Generator) -> Callable[[PILImage.Image], PILImage.Image]:
    """Mirrored, moved, smaller, larger, or of another brightness: one of them, chosen now."""
    white = PILImage.new("RGB", (SIDE, SIDE), "white")
    kind, strength = rng.integers(5), rng.uniform()
    x, y = (int(value) for value in rng.integers(-6, 7, size=2))

    def alter(picture: PILImage.Image) -> PILImage.Image:
        if kind == 0:
            return picture.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        if kind == 1:
            page = white.copy()
            page.paste(picture, (x, y))
            return page
        if kind == 2:
            side = round(SIDE * (0.75 + 0.2 * strength))
            page = white.copy()
            page.paste(picture.resize((side, side)), ((SIDE - side) // 2, (SIDE - side) // 2))
            return page
        if kind == 3:
            edge = 2 + round(3 * strength)
            return picture.crop((edge, edge, SIDE - edge, SIDE - edge)).resize((SIDE, SIDE))
        return ImageEnhance.Brightness(picture).enhance(0.7 + 0.45 * strength)

    return alter


# --- sounds -------------------------------------------------------------------------------------


class SoundFeatures:
    """Sounds -> float[M, D] of unit length, whitened by what varies between takes."""

    def __init__(self, takes: Sequence[Sequence[Medium]]):
        """`takes`: the training takes of each concept."""
        rows = [np.stack([sound_statistics(take) for take in group]) for group in takes]
        together = np.concatenate(rows)
        self._mean, self._scale = together.mean(axis=0), together.std(axis=0) + 1e-6
        within = np.concatenate([(group - group.mean(axis=0)) / self._scale for group in rows])
        covariance = within.T @ within / len(within)
        level = np.trace(covariance) / len(covariance)
        covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * level * np.eye(len(covariance))
        values, vectors = np.linalg.eigh(covariance)
        self._whiten = vectors / np.sqrt(values)

    def __call__(self, media: Sequence[Medium]) -> np.ndarray:
        rows = np.stack([sound_statistics(medium) for medium in media])
        return _unit((rows - self._mean) / self._scale @ self._whiten)


def sound_statistics(sound: Medium) -> np.ndarray:
    """A sound -> float[D] that tells neither loudness nor when it begins."""
    import torchaudio

    assert isinstance(sound, Audio)
    wave = torch.tensor(media.resample(sound, RATE).to_numpy().mean(axis=0))[: 4 * RATE]
    wave = torch.nan_to_num(wave)
    wave = torch.nn.functional.pad(wave, (0, max(0, 2048 - len(wave))))
    bands = torch.log(_mel()(wave / wave.abs().max().clamp(min=1e-4)) + _FLOOR)  # [64, T]
    mfcc = bands.T @ torchaudio.functional.create_dct(20, len(bands), "ortho")  # [T, 20]
    changes = bands.diff(dim=1).abs().mean(dim=1)
    loudest = bands.topk(max(1, bands.shape[1] // 10), dim=1).values.mean(dim=1)
    rhythm = [
        torch.fft.rfft(part.mean(dim=0) - part.mean(), n=256).abs()[1:49].log1p()
        for part in bands.split(16)
    ]
    return torch.cat([mfcc.mean(0)[1:], mfcc.std(0), changes, loudest, *rhythm]).numpy()


@cache
def _mel() -> Callable[[Tensor], Tensor]:
    import torchaudio

    return torchaudio.transforms.MelSpectrogram(
        RATE, n_fft=1024, hop_length=256, n_mels=64, f_min=40.0, f_max=RATE / 2
    )


def _alter_sound(sound: Medium, rng: np.random.Generator) -> Audio:
    """Moved by up to a quarter of a second, softer, with a little noise."""
    assert isinstance(sound, Audio)
    wave = media.resample(sound, RATE).to_numpy().mean(axis=0)
    move = int(rng.integers(-RATE // 4, RATE // 4))
    moved = np.pad(wave, (max(move, 0), max(-move, 0)))[max(-move, 0) :][: len(wave)]
    noise = rng.normal(0, rng.uniform(0.001, 0.01) * np.abs(wave).max(), len(wave))
    altered = (moved + noise) * rng.uniform(0.3, 0.9)
    return Audio.from_numpy(altered.clip(-1, 1).astype(np.float32), RATE)


_ALTER: dict[str, Callable[[Medium, np.random.Generator], Medium]] = {
    "image": _alter_picture,
    "video": _alter_clip,
    "audio": _alter_sound,
}


def _unit(rows: np.ndarray) -> np.ndarray:
    """float[..., D] -> the same directions, length 1."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.maximum(length, 1e-12)
