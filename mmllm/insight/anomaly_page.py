"""A page of anomalies: each medium next to the map of where it is unlike normal ones."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.gallery import page_html, spectrogram
from mmllm.insight.anomaly import Anomaly
from mmllm.insight.data_uris import data_uri, webp_uri
from mmllm.utils.files import atomic_write

_SIDE = 240
"""Pixels of the longer side of pictures and frames."""
_SOUND = (320, 80)
"""Pixels of a spectrogram."""
_OPACITY = 0.75
"""Of the oddest cells over a picture."""
_STYLE = """
.oddities{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
.oddities article{margin:0}.oddities h2{margin:0;font-size:1rem;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.4rem;margin-top:.6rem}
.pair.sound{grid-template-columns:1fr}.pair figure{margin:0}
.pair img{width:100%;height:auto;display:block;border-radius:6px}
.pair.sound img{height:5rem;object-fit:fill}
.facts{font-variant-numeric:tabular-nums}.odd{color:#d9480f;font-weight:600}
.scale{display:inline-block;vertical-align:middle;width:8rem;height:.7rem;border-radius:3px}
"""
_ODD = 0.05


def write_anomaly_page(file: Path, title: str, found: Mapping[str, tuple[Medium, Anomaly]]) -> None:
    """Write the page, one file that asks no other host: the oddest medium first.

    All maps have one scale, from their median to their maximum.

    Args:
        file: where.
        title: its title.
        found: name -> a medium and what an AnomalyDetector says of it; at least one.

    Raises:
        MediaError: a medium cannot be read.
    """
    values = np.concatenate([entry.map.numpy().ravel() for _, entry in found.values()])
    low, high = float(np.median(values)), float(values.max())
    ordered = sorted(found.items(), key=lambda pair: -pair[1][1].score)
    articles = "".join(
        _article(name, medium, entry, low, high) for name, (medium, entry) in ordered
    )
    steps = ",".join(f"rgb{tuple(map(int, colour))}" for colour in _colours(np.linspace(0, 1, 6)))
    scale = f'<i class="scale" style="background:linear-gradient(90deg,{steps})"></i>'
    body = (
        f'<style>{_STYLE}</style><p class="quiet">Distance from the nearest normal media: '
        f"{low:.2f} {scale} {high:.2f}. p is the share of normal media that are as odd.</p>"
        f'<div class="oddities">{articles}</div>'
    )
    atomic_write(file, page_html(title, body))


def _article(name: str, medium: Medium, entry: Anomaly, low: float, high: float) -> str:
    heat = np.clip((entry.map.float().numpy() - low) / max(high - low, 1e-9), 0, 1)
    kind = " sound" if isinstance(medium, Audio) else ""
    plain, mapped = _sound(medium, heat) if isinstance(medium, Audio) else _frames(medium, heat)
    text = html.escape(name)
    p_class = ' class="odd"' if entry.p_value <= _ODD else ""
    facts = f"distance {entry.score:.3f} · <span{p_class}>p {entry.p_value:.3f}</span>"
    if entry.surprisal is not None:
        facts += f" · -log p {entry.surprisal:.1f}"
    player = ""
    if isinstance(medium, Audio):
        uri = data_uri("audio/ogg", medium.resample(16_000).to_bytes("ogg"))
        player = f'<audio controls preload="none" src="{uri}"></audio>'
    return (
        f'<article><h2>{text}</h2><p class="quiet facts">{facts}</p><div class="pair{kind}">'
        f'<figure><img src="{plain}" alt="{text}" loading="lazy"></figure>'
        f'<figure><img src="{mapped}" alt="where it is odd" loading="lazy"></figure></div>'
        f"{player}</article>"
    )


def _frames(medium: Medium, heat: np.ndarray) -> tuple[str, str]:
    """A picture or clip, and the same under its map float[h, w] or [frames, h, w]."""
    maps = list(heat.reshape(-1, *heat.shape[-2:]))
    if isinstance(medium, Video):
        pictures = [PILImage.fromarray(frame) for frame in medium.sample_frames(len(maps))]
    else:
        assert isinstance(medium, Image)
        pictures = [medium.to_pil().convert("RGB")]
    plain, mapped = [], []
    for picture, values in zip(pictures, maps, strict=True):
        scale = _SIDE / max(picture.size)
        size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
        picture = picture.resize(size, PILImage.Resampling.LANCZOS)
        smooth = _resized(values, size)[..., None]
        share = _OPACITY * smooth
        pixels = np.asarray(picture, dtype=float) * (1 - share) + _colours(smooth[..., 0]) * share
        plain.append(picture)
        mapped.append(PILImage.fromarray(pixels.astype(np.uint8)))
    return webp_uri(plain), webp_uri(mapped)


def _sound(medium: Audio, heat: np.ndarray) -> tuple[str, str]:
    """The spectrogram of a sound, and its map float[time, frequency]: time to the right, the
    encoder's bands upwards."""
    picture = spectrogram(medium.resample(16_000)).to_pil().resize(_SOUND)
    mapped = _colours(_resized(heat.T[::-1], _SOUND)).astype(np.uint8)
    return webp_uri([picture]), webp_uri([PILImage.fromarray(mapped)])


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float[h, w] -> float[*reversed(size)] between 0 and 1."""
    picture = PILImage.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.clip(np.asarray(picture.resize(size, PILImage.Resampling.BICUBIC)), 0, 1)


def _colours(values: np.ndarray) -> np.ndarray:
    """float[…] between 0 and 1 -> float[…, 3] from 0 to 255."""
    from matplotlib import colormaps

    return colormaps["inferno"](values)[..., :3] * 255
