"""HTML page of conversations with their media, for training, evaluation and the README."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmllm.conversation import Audio, Image, Medium, Message, Text, Video

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;
color:#222;background:#fafafa}h1{font-size:1.3rem}main{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(240px,1fr))}article{background:#fff;padding:.8rem;
border:1px solid #e4e4e4;border-radius:10px}p{margin:.2rem 0}.user{color:#555}
.user::before{content:"\\25B8 "}img{image-rendering:auto;border-radius:6px;max-width:100%}
img.small{width:128px}audio{width:100%}figure{margin:.3rem 0}figcaption{color:#777;font-size:13px}
"""


@dataclass(frozen=True)
class GalleryEntry:
    """One conversation of the page.

    Attributes:
        messages: its turns.
        note: a line below it.
    """

    messages: tuple[Message, ...]
    note: str = ""


def write_gallery(folder: Path, title: str, entries: Sequence[GalleryEntry]) -> Path:
    """Write a page that shows conversations, index.html, and their media next to it.

    Clips are animated WebP, sounds WAV with an image of their spectrogram.

    Args:
        folder: the folder to write to, which is made.
        title: the page's title.
        entries: the conversations, each with a note.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    articles = []
    for number, entry in enumerate(entries):
        lines = []
        for turn, message in enumerate(entry.messages):
            for place, part in enumerate(message.parts):
                name = f"{number:03d}-{turn}-{place}"
                shown = (
                    f'<p class="{message.role}">{html.escape(part.text)}</p>'
                    if isinstance(part, Text)
                    else _show(folder, name, part)
                )
                lines.append(shown)
        note = f"<figcaption>{html.escape(entry.note)}</figcaption>" if entry.note else ""
        articles.append(f"<article>{''.join(lines)}{note}</article>")
    page = folder / "index.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><main>{''.join(articles)}</main>",
        encoding="utf-8",
    )
    return page


def spectrogram(audio: Audio) -> Image:
    """A log-frequency-free picture of a sound: time to the right, frequency upwards, in dB."""
    samples = audio.to_numpy().mean(axis=0)
    size, hop = 512, 256
    frames = max(1 + (len(samples) - size) // hop, 1)
    padded = np.pad(samples, (0, max(0, size + (frames - 1) * hop - len(samples))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop][:frames]
    power = np.abs(np.fft.rfft(windows * np.hanning(size), axis=1)) ** 2  # [frames, bins]
    decibel = 10 * np.log10(power + 1e-6)
    scaled = np.clip((decibel - decibel.max() + 70) / 70, 0, 1).T[::-1]  # 70 dB of range
    from matplotlib import colormaps

    return Image.from_numpy((colormaps["magma"](scaled)[..., :3] * 255).astype(np.uint8))


def _show(folder: Path, name: str, medium: Medium) -> str:
    """Save one medium and return the HTML that shows it."""
    if not medium.has_data:
        return f"<p>[{medium.modality}: {html.escape(medium.caption or '')}]</p>"
    if isinstance(medium, Image):
        medium.save(folder / f"{name}.png")
        return f'<img class=small src="{name}.png" alt="{html.escape(medium.caption or "")}">'
    if isinstance(medium, Video):
        medium.save(folder / f"{name}.webp")
        return f'<img class=small src="{name}.webp" alt="{html.escape(medium.caption or "")}">'
    assert isinstance(medium, Audio)
    medium.save(folder / f"{name}.wav")
    spectrogram(Audio.from_numpy(medium.to_numpy(), 1)).save(folder / f"{name}.png")
    return (
        f'<figure><img src="{name}.png" alt=spectrogram>'
        f'<audio controls preload=none src="{name}.wav"></audio></figure>'
    )
