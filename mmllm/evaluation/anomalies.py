"""The row `insight/anomaly`: defects that are made in media of mini's data, and media of another
class, found by mmllm.insight.anomaly.

Legend: N normal media of one concept, A odd ones.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.evaluation.metrics import Metric, mean_metric, with_threshold
from mmllm.insight.anomaly import AnomalyDetector, odds_of_no, question, surprisal_of

OnProgress = Callable[[int], object]

BARS = {"pictures": 0.98, "pictures, where": 0.95, "sounds": 0.90, "clips": 0.85}
BAR_OF_ASKING = 0.85
SIDE = 96
"""Pixels of a picture."""


def measure_anomalies(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """AUROC of what is normal against what is not, by concept.

    Args:
        chat: the model.
        data: the folder of mini's data.
        num: concepts of each modality.
        on_progress: takes the number of concepts that were measured.
    """
    concepts = json.loads((data / "concepts.json").read_text(encoding="utf-8"))
    trained = [concept for concept in concepts if concept["split"] == "train"]
    pictures = spread([concept["id"] for concept in trained], num)
    sounds = spread(sorted(path.name for path in (data / "sounds").iterdir() if path.is_dir()), num)
    clips = spread([concept["id"] for concept in trained if concept["clip"]], num)
    start = time.perf_counter()
    by_name: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        by_name.setdefault(name, []).append(value)

    counts = {"pictures": 0, "sounds": 0, "clips": 0}
    for kind, ids, make in (
        ("pictures", pictures, picture_set),
        ("sounds", sounds, sound_set),
        ("clips", clips, clip_set),
    ):
        for number, concept in enumerate(ids):
            bank, normal, odd, places = make(data, concept, np.random.default_rng(number))
            detector = AnomalyDetector(chat, bank)
            found = detector.score([*normal, *odd])
            scores = [anomaly.score for anomaly in found]
            add(kind, auroc(scores[len(normal) :], scores[: len(normal)]))
            raw = [raw_distance(medium, bank) for medium in (*normal, *odd)]
            add(f"{kind}, raw values", auroc(raw[len(normal) :], raw[: len(normal)]))
            for anomaly, place in zip(found[len(normal) :], places, strict=False):
                seen = F.interpolate(anomaly.map[None, None], place.shape, mode="bilinear")[0, 0]
                where = torch.from_numpy(place)
                add(f"{kind}, where", auroc(seen[where].tolist(), seen[~where].tolist()))
            counts[kind] += len(found)
            on_progress(1)
    for name, values in by_name.items():
        n = len(values) if name.endswith("where") else counts[name.partition(",")[0]]
        metric = replace(mean_metric(f"insight/anomaly, {name}", values, start), n=n)
        yield with_threshold(metric, BARS[name]) if name in BARS else metric
        start = time.perf_counter()
    yield from _named_class(chat, data, trained, pictures)


def _named_class(
    chat: Any, data: Path, trained: Sequence[Any], ids: Sequence[str]
) -> Iterator[Metric]:
    """Is it the named class? Pictures of an unseen style with their own name and with others."""
    start = time.perf_counter()
    captions = {concept["id"]: concept["caption"] for concept in trained}
    surprisals: dict[bool, list[float]] = {True: [], False: []}
    odds: dict[bool, list[float]] = {True: [], False: []}
    for number, concept in enumerate(ids):
        picture = Image(data / "pictures" / "twemoji" / f"{concept}.webp")
        for step in (0, 1, 2):  # its own name, and two others
            caption = captions[ids[(number + step * 5) % len(ids)]]
            is_odd = caption != captions[concept]
            surprisals[is_odd].append(surprisal_of(chat, picture, f"It is {caption}."))
            odds[is_odd].append(odds_of_no(chat, question(picture, name=caption)))
    n = sum(map(len, odds.values()))
    for name, scores, bar in (
        ("surprisal of the description", surprisals, BAR_OF_ASKING),
        ("asked for yes or no", odds, BAR_OF_ASKING),
    ):
        value = auroc(scores[True], scores[False])
        half = 1.96 * auroc_error(value, len(scores[True]), len(scores[False]))
        metric = Metric(f"insight/anomaly, {name}", n, value, value - half, min(value + half, 1))
        seconds = round(time.perf_counter() - start, 2)
        yield replace(metric, threshold=f"{bar:.3f}", met=value >= bar, seconds=seconds)


def picture_set(data: Path, concept: str, draw: np.random.Generator) -> Any:
    """8 normal pictures, 8 more, 12 with a defect, and where it is bool[H, W]: a hole, a blot, a
    piece of another place, or a scratch.

    Args:
        data: the folder of mini's data.
        concept: whose picture is meant.
        draw: source of randomness.
    """
    whole = Image(data / "pictures" / "fluent-3d" / f"{concept}.webp").to_pil().resize((SIDE, SIDE))
    pixels = np.asarray(whole)

    def normal() -> np.ndarray:
        shifted = np.roll(pixels, draw.integers(-2, 3, size=2), axis=(0, 1))
        return (shifted * draw.uniform(0.9, 1.0)).astype(np.uint8)

    subject = np.argwhere((pixels < 240).any(-1))
    odd, places = [], []
    for kind in ("hole", "blot", "paste", "scratch") * 3:
        array, place = normal(), np.zeros((SIDE, SIDE), bool)
        size = int(draw.integers(8, 17))
        y, x = (int(v) for v in subject[draw.integers(len(subject))] - size // 2)
        y, x = (min(max(v, 0), SIDE - size) for v in (y, x))
        height = 3 if kind == "scratch" else size
        box = slice(y, y + height), slice(x, x + size)
        place[box] = True
        if kind == "paste":
            v, u = draw.integers(0, SIDE - size, size=2)
            array[box] = array[v : v + height, u : u + size]
        else:
            colour = 255 if kind == "hole" else draw.integers(0, 256, size=3)
            array[box] = colour
        odd.append(Image.from_numpy(array))
        places.append(place)
    bank, more = ([Image.from_numpy(normal()) for _ in range(8)] for _ in range(2))
    return bank, more, odd, places


def sound_set(data: Path, concept: str, draw: np.random.Generator) -> Any:
    """Half of the takes, the others, and these with a click, a gap, noise, hum, or at another
    pitch.

    Args:
        data: the folder of mini's data.
        concept: whose sound is meant.
        draw: source of randomness.
    """
    takes = [Audio(path) for path in sorted((data / "sounds" / concept).glob("*.ogg"))]
    bank, more = takes[::2], takes[1::2]
    odd = []
    for take in more:
        rate, wave = take.decoded().sample_rate or 44_100, take.to_numpy()
        peak, length = float(np.abs(wave).max()) or 1.0, wave.shape[1]
        at = int(draw.integers(length // 8, max(length // 2, length // 8 + 1)))
        time_axis = np.arange(length) / rate
        clicked, cut = wave.copy(), wave.copy()
        clicked[:, at : at + rate // 200] = peak
        cut[:, at : at + rate // 4] = 0
        noisy = wave + draw.normal(0, 0.1 * peak, wave.shape)
        hum = wave + 0.3 * peak * np.sin(2 * math.pi * 100 * time_axis)
        higher = wave[:, np.minimum((np.arange(length) * 1.5).astype(int), length - 1)]
        for changed in (clicked, cut, noisy, hum, higher):
            limited = np.clip(changed, -1, 1).astype(np.float32)
            odd.append(Audio.from_numpy(limited, rate))
    return bank, more, odd, []


def clip_set(data: Path, concept: str, draw: np.random.Generator) -> Any:
    """6 normal clips, 6 more, and 12 that stand still, run backwards, or have two parts swapped.

    Args:
        data: the folder of mini's data.
        concept: whose clip is meant.
        draw: source of randomness.
    """
    clip = Video(data / "clips" / f"{concept}.webp").decoded()
    frames, fps = clip.to_numpy(), clip.fps or 8.0

    def normal(frames: np.ndarray = frames) -> Video:
        shifted = np.roll(frames, draw.integers(-1, 2, size=2), axis=(1, 2))
        return Video.from_numpy((shifted * draw.uniform(0.9, 1.0)).astype(np.uint8), fps)

    half = len(frames) // 2
    still = np.repeat(frames[:1], len(frames), axis=0)
    swapped = np.concatenate([frames[half:], frames[:half]])
    odd = [normal(changed) for changed in (still, frames[::-1], swapped) for _ in range(4)]
    bank, more = ([normal() for _ in range(6)] for _ in range(2))
    return bank, more, odd, []


def raw_distance(medium: Medium, bank: Sequence[Medium]) -> float:
    """The mean absolute difference from the nearest normal medium, sample by sample.

    Args:
        medium: an image, a sound or a clip.
        bank: normal media of its kind.
    """
    values = medium.to_numpy().astype(np.float32)
    distances = []
    for normal in bank:
        other = normal.to_numpy().astype(np.float32)
        common = tuple(slice(0, min(a, b)) for a, b in zip(values.shape, other.shape, strict=True))
        distances.append(float(np.abs(values[common] - other[common]).mean()))
    return min(distances)


def auroc(odd: Sequence[float], normal: Sequence[float]) -> float:
    """The probability that an odd item scores higher than a normal one; ties count half.

    Args:
        odd: scores of A items.
        normal: scores of N items.

    Example:
        >>> auroc([3.0, 2.0], [1.0, 2.0])
        0.875
    """
    high, low = (torch.tensor(scores, dtype=torch.float64) for scores in (odd, normal))
    order: Tensor = torch.cat([low, high]).unique(return_inverse=True)[1]
    counts = torch.bincount(order[: len(low)], minlength=int(order.max()) + 1).double()
    below = counts.cumsum(0) - counts / 2
    return (below[order[len(low) :]].mean() / len(low)).item()


def auroc_error(value: float, num_odd: int, num_normal: int) -> float:
    """The standard error of an AUROC (Hanley and McNeil 1982).

    Args:
        value: the AUROC.
        num_odd: A.
        num_normal: N.
    """
    q1, q2, square = value / (2 - value), 2 * value**2 / (1 + value), value**2
    spread_ = value * (1 - value) + (num_odd - 1) * (q1 - square) + (num_normal - 1) * (q2 - square)
    return math.sqrt(max(spread_, 0) / (num_odd * num_normal))


def spread(ids: Sequence[str], num: int) -> list[str]:
    """Take `num` of the ids, evenly spaced; all, if there are fewer.

    Args:
        ids: the ids.
        num: how many.
    """
    return [ids[index * len(ids) // num] for index in range(num)] if num < len(ids) else list(ids)
