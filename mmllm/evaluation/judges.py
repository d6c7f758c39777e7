"""Judges of generated media: nearest-neighbour retrieval of the concept among real items.

The gallery holds one real item of every trained concept. No part of `mini` uses these features:
- images: EfficientNet-Lite1 (the encoder of mini is Lite0) on a 2 x 2 grid, and coarse colours by
  position, of what stands out from the background; a video is the mean of three of its frames;
- audio: statistics of MFCC and log-mel frames and the modulation spectrum of their loudness,
  whitened by the within-concept covariance over the training takes (Hatch et al. 2006, WCCN).
`Judge.validate` measures a judge on altered real items.

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

from mmllm import mini
from mmllm.conversation import MEDIA, Audio, Image, Medium, Video
from mmllm.data.sources import read_text

FeatureFunction = Callable[[Sequence[Medium]], np.ndarray]
"""Media -> float[M, D]; the dot product of two rows is their similarity."""

RATE = 16_000
SIDE = 64
"""Pixels at which things are compared, because otherwise sharpness would separate real items from
generated ones."""

_STANDS_OUT = 24
"""Levels of 255 by which a pixel differs from the background in one channel at least."""
_MARGIN = 0.06
"""Of the side, around what stands out."""

_COLOUR_WEIGHT = 0.2
"""Weight of the colours relative to the network's features."""
_NUM_FRAMES = 3
_SHRINKAGE = 0.2
_POWER_FLOOR = 0.1
"""Added to mel power before the logarithm (peak amplitude 1), so that faint noise has no effect."""
_GALLERY = {"image": {"style": "fluent-3d"}, "video": {"style": "fluent-3d"}, "audio": {"take": 0}}
"""Modality -> fields of the one training item of a concept that is in the gallery: of clips, whose
things are those of pictures and move in many ways, the picture."""


@dataclass(frozen=True)
class JudgeValidation:
    """Retrieval accuracy of a judge on altered real items."""

    n: int
    top1: float
    top5: float


class Judge:
    """Ranks the concepts of one modality by the similarity of a medium to their real items.

    Args:
        features: embeds media.
        gallery: concept -> its real item.
    """

    def __init__(self, features: FeatureFunction, gallery: Mapping[str, Medium]):
        self.concepts = list(gallery)
        self.gallery = dict(gallery)
        self._features = features
        self._gallery_features = features(list(gallery.values()))  # [concepts, D]

    def rank(self, media: Sequence[Medium]) -> list[list[str]]:
        """All concepts for each medium, nearest first."""
        if not media:
            return []
        similarity = self._features(media) @ self._gallery_features.T  # [M, concepts]
        order = np.argsort(-similarity, axis=1, kind="stable")
        return [[self.concepts[index] for index in row] for row in order]

    def validate(self, altered: Sequence[tuple[str, Medium]]) -> JudgeValidation:
        """Top-1 and top-5 accuracy on (concept, altered real item) pairs."""
        ranked = self.rank([medium for _, medium in altered])
        hits = [(c in row[:1], c in row[:5]) for (c, _), row in zip(altered, ranked, strict=True)]
        top1, top5 = np.mean(hits, axis=0)
        return JudgeValidation(len(hits), float(top1), float(top5))


def build_judge(modality: str, *, data: Path | None = None, num: int | None = None) -> Judge:
    """The judge of one modality over mini's data.

    Args:
        modality: image, audio or video.
        data: folder of the data; the shipped one unless given.
        num: use only this many concepts, the first ones.

    Raises:
        AssetError: the network of the image judge cannot be fetched.
    """
    data = data or mini.locate("data")
    items = [item for item in read_items(data, modality) if item["split"] == "train"]
    if modality == "video":
        moving = {item["concept"] for item in items}
        items = [item for item in read_items(data, "image") if item["concept"] in moving]
    fields = _GALLERY[modality].items()
    chosen = [item for item in items if all(item[key] == value for key, value in fields)][:num]
    gallery = {item["concept"]: open_item(data, item) for item in chosen}
    if modality != "audio":
        return Judge(ImageFeatures([*gallery.values()]), gallery)
    takes: dict[str, list[Medium]] = {}
    for item in items:
        if item["concept"] in gallery:
            takes.setdefault(item["concept"], []).append(open_item(data, item))
    return Judge(AudioFeatures(list(takes.values())), gallery)


def altered_items(
    modality: str, judge: Judge, *, data: Path | None = None, num: int = 200, seed: int = 0
) -> list[tuple[str, Medium]]:
    """Return (concept, item) pairs that validate a judge.

    They are its gallery mirrored, shifted, rescaled, darker or brighter, for video moving across
    the frames, too; for audio its gallery shifted in time, softer and noisy, and one held-out take
    of each concept.

    Args:
        modality: image, audio or video.
        judge: the judge, with its gallery.
        data: the folder of the data; None: that of mini.
        num: how many concepts, evenly spaced in the list.
        seed: draws the alterations.
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


def motion(video: Medium) -> float:
    """Mean absolute difference of consecutive frames, 0 to 1."""
    frames = video.to_numpy().astype(np.float32) / 255  # [F, H, W, 3]
    return float(np.abs(np.diff(frames, axis=0)).mean()) if len(frames) > 1 else 0.0


def read_items(data: Path, modality: str) -> list[dict[str, Any]]:
    """Return the rows of one modality in items.json.gz and sounds.json.gz.

    Args:
        data: the folder of the data.
        modality: image, audio or video.
    """
    items = json.loads(read_text(data / "items.json.gz"))
    items += json.loads(read_text(data / "sounds.json.gz"))["items"]
    return [item for item in items if item["modality"] == modality]


def open_item(data: Path, item: Mapping[str, Any]) -> Medium:
    """Return the medium of a row, not yet decoded.

    Args:
        data: the folder of the data.
        item: a row of `read_items`.
    """
    return MEDIA[item["modality"]](source=data / item["file"])


# --- images and videos -------------------------------------------------------------------------


class ImageFeatures:
    """Images or videos -> float[M, D]: two concatenated unit vectors, the second weighted less.

    Args:
        real: items whose mean colours are subtracted, so that a white background has no effect.
    """

    def __init__(self, real: Sequence[Medium]):
        self._mean_colours = np.stack([_colours(_frames(medium)) for medium in real]).mean(axis=0)

    def __call__(self, media: Sequence[Medium]) -> np.ndarray:
        rows = []
        for start in range(0, len(media), 8):
            batch = [_frames(medium) for medium in media[start : start + 8]]
            with torch.inference_mode():
                tokens = _network().encode([Image.from_pil(f) for frames in batch for f in frames])
            rest = tokens.tokens.float().flatten(1).numpy()  # [frames, 4 * 1280]
            for frames in batch:
                shape, rest = rest[: len(frames)].mean(axis=0), rest[len(frames) :]
                colours = _colours(frames) - self._mean_colours
                rows.append(np.concatenate([_unit(shape), _COLOUR_WEIGHT**0.5 * _unit(colours)]))
        return np.stack(rows)


@cache
def _network() -> Any:
    from mmllm.encoders.efficientnet import EfficientNetConfig, build

    return build(
        EfficientNetConfig(weights="mini:efficientnet-lite1", variant="lite1", grid=2, size=128)
    )


def _frames(medium: Medium) -> list[PILImage.Image]:
    """What stands out in an image, or in three frames of a video, at 64 px."""
    if isinstance(medium, Video):
        frames = [*medium.sample_frames(_NUM_FRAMES)]
    else:
        assert isinstance(medium, Image)
        frames = [medium.to_numpy()]
    cut = [PILImage.fromarray(cut_out(frame)) for frame in frames]
    return [frame.resize((SIDE, SIDE), PILImage.Resampling.LANCZOS) for frame in cut]


def cut_out(image: np.ndarray) -> np.ndarray:
    """Cut what stands out from a plain background: it fills a white square.

    Args:
        image: uint8[H, W, 3]; its background is the median of its outermost pixels.

    Returns:
        uint8[S, S, 3].
    """
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(edge, axis=0)
    stands_out = np.abs(image - ground).max(axis=-1) > _STANDS_OUT
    rows, columns = np.flatnonzero(stands_out.any(1)), np.flatnonzero(stands_out.any(0))
    if not len(rows):
        return np.full((SIDE, SIDE, 3), 255, np.uint8)
    (top, bottom), (left, right) = (line[[0, -1]] + (0, 1) for line in (rows, columns))
    white = np.where(stands_out[..., None], image, 255)[top:bottom, left:right]
    side = round(max(white.shape[:2]) * (1 + 2 * _MARGIN))
    square = np.full((side, side, 3), 255, np.uint8)
    y, x = (side - white.shape[0]) // 2, (side - white.shape[1]) // 2
    square[y : y + white.shape[0], x : x + white.shape[1]] = white
    return square


def _colours(frames: Sequence[PILImage.Image]) -> np.ndarray:
    """Mean colours of an 8 x 8 grid: float[192]."""
    grids = [frame.resize((8, 8), PILImage.Resampling.BOX) for frame in frames]
    return np.mean([np.asarray(g, dtype=np.float32).ravel() for g in grids], axis=0)


def _alter_image(image: Medium, rng: np.random.Generator) -> Image:
    assert isinstance(image, Image)
    return Image.from_pil(_alteration(rng)(image.to_pil().resize((SIDE, SIDE))))


def _alter_video(image: Medium, rng: np.random.Generator) -> Video:
    """An altered picture that moves across the frames."""
    picture = _alter_image(image, rng).to_pil()
    way = [(round(8 * x), round(8 * y)) for x, y in np.linspace(rng.uniform(-1, 1, 2), (0, 0), 9)]
    frames = [PILImage.new("RGB", (SIDE + 16, SIDE + 16), "white") for _ in way]
    for frame, (x, y) in zip(frames, way, strict=True):
        frame.paste(picture, (8 + x, 8 + y))
    return Video.from_numpy(np.stack([np.asarray(frame) for frame in frames]), 8.0)


def _alteration(rng: np.random.Generator) -> Callable[[PILImage.Image], PILImage.Image]:
    """One random alteration: mirrored, shifted, smaller, larger, or another brightness."""
    white = PILImage.new("RGB", (SIDE, SIDE), "white")
    kind, strength = rng.integers(5), rng.uniform()
    x, y = (int(value) for value in rng.integers(-6, 7, size=2))

    def alter(image: PILImage.Image) -> PILImage.Image:
        if kind == 0:
            return image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        if kind == 1:
            canvas = white.copy()
            canvas.paste(image, (x, y))
            return canvas
        if kind == 2:
            side = round(SIDE * (0.75 + 0.2 * strength))
            canvas = white.copy()
            canvas.paste(image.resize((side, side)), ((SIDE - side) // 2, (SIDE - side) // 2))
            return canvas
        if kind == 3:
            margin = 2 + round(3 * strength)
            return image.crop((margin, margin, SIDE - margin, SIDE - margin)).resize((SIDE, SIDE))
        return ImageEnhance.Brightness(image).enhance(0.7 + 0.45 * strength)

    return alter


# --- audio --------------------------------------------------------------------------------------


class AudioFeatures:
    """Audio -> float[M, D] of unit length, whitened by the covariance between takes of a concept.

    Args:
        takes: the training takes of each concept.
    """

    def __init__(self, takes: Sequence[Sequence[Medium]]):
        rows = [np.stack([audio_statistics(take) for take in group]) for group in takes]
        together = np.concatenate(rows)
        self._mean, self._scale = together.mean(axis=0), together.std(axis=0) + 1e-6
        within = np.concatenate([(group - group.mean(axis=0)) / self._scale for group in rows])
        covariance = within.T @ within / len(within)
        level = np.trace(covariance) / len(covariance)
        covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * level * np.eye(len(covariance))
        values, vectors = np.linalg.eigh(covariance)
        self._whiten = vectors / np.sqrt(values)

    def __call__(self, media: Sequence[Medium]) -> np.ndarray:
        rows = np.stack([audio_statistics(medium) for medium in media])
        return _unit((rows - self._mean) / self._scale @ self._whiten)


def audio_statistics(audio: Medium) -> np.ndarray:
    """Audio -> float[D], independent of loudness and of the time of the onset."""
    import torchaudio

    assert isinstance(audio, Audio)
    wave = torch.tensor(audio.resample(RATE).to_numpy().mean(axis=0))[: 4 * RATE]
    wave = torch.nan_to_num(wave)
    wave = torch.nn.functional.pad(wave, (0, max(0, 2048 - len(wave))))
    bands = torch.log(_mel()(wave / wave.abs().max().clamp(min=1e-4)) + _POWER_FLOOR)  # [64, T]
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


def _alter_audio(audio: Medium, rng: np.random.Generator) -> Audio:
    """Shifted by up to a quarter of a second, softer, with a little noise."""
    assert isinstance(audio, Audio)
    wave = audio.resample(RATE).to_numpy().mean(axis=0)
    shift = int(rng.integers(-RATE // 4, RATE // 4))
    shifted = np.pad(wave, (max(shift, 0), max(-shift, 0)))[max(-shift, 0) :][: len(wave)]
    noise = rng.normal(0, rng.uniform(0.001, 0.01) * np.abs(wave).max(), len(wave))
    altered = (shifted + noise) * rng.uniform(0.3, 0.9)
    return Audio.from_numpy(altered.clip(-1, 1).astype(np.float32), RATE)


_ALTER: dict[str, Callable[[Medium, np.random.Generator], Medium]] = {
    "image": _alter_image,
    "video": _alter_video,
    "audio": _alter_audio,
}


def _unit(rows: np.ndarray) -> np.ndarray:
    """float[..., D] -> vectors of length 1 with the same directions."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.maximum(length, 1e-12)
