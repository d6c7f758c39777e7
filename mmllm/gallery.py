"""HTML pages of conversations with their media: samples of a run, of a data set, of two models.

A page stands alone in its folder and asks no other host. A medium is shown by its file; small
images are magnified without blur, and a click enlarges them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import Audio, Image, Medium, Message, Text, Video

SAVED = "gallery.json"
"""The entries of a gallery, with the names of their files."""
_SMALL = 256
"""Images of fewer pixels a side are magnified."""
STYLE = """
:root{color-scheme:light dark;--text:#222;--quiet:#666;--page:#fafafa;--card:#fff;--line:#ddd}
@media (prefers-color-scheme:dark){
:root{--text:#e6e6e6;--quiet:#a0a0a0;--page:#16181c;--card:#1f2228;--line:#3a3e46}}
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;
color:var(--text);background:var(--page);overflow-wrap:break-word}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin-top:2rem}p{margin:.2rem 0}
.quiet,figcaption{color:var(--quiet);font-size:13px}
.masonry{columns:17rem;column-gap:1rem}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem;
margin:0 0 1rem;break-inside:avoid}
.speaker{color:var(--quiet);font-size:12px;margin-top:.4rem}
figure{margin:.4rem 0}figure img{display:block;border-radius:6px;width:16rem;max-width:100%}
img.small{image-rendering:pixelated}img.spectrogram{width:100%;height:4rem;object-fit:fill}
audio{width:100%;min-width:12rem;height:2.5rem;margin-top:.3rem}
.zoom{all:unset;display:block;cursor:zoom-in}.zoom:focus-visible{outline:2px solid #4a6cf7}
.zoom.large{position:fixed;inset:0;z-index:9;background:#000c;display:grid;cursor:zoom-out}
.zoom.large img{margin:auto;width:min(96vw,96vh)}
.scroll{overflow-x:auto}.scroll:focus-visible{outline:2px solid #4a6cf7}
.compared{border-collapse:collapse;width:100%}.compared tbody th{width:22%;font-weight:400}
.compared th,.compared td{text-align:left;vertical-align:top;padding:.6rem;min-width:9rem;
border-top:1px solid var(--line);overflow-wrap:anywhere}
@media (max-width:40rem){body{margin:1rem auto}
.compared tr{display:flex;flex-wrap:wrap}
.compared th,.compared td{flex:1;min-width:0;padding:.3rem;border-top:0}
.compared tbody th{flex:1 0 100%;font-weight:600;border-top:1px solid var(--line)}
.compared thead th:first-child{display:none}.compared audio{width:100%;min-width:0}}
"""
_SCRIPT = "addEventListener('click',e=>e.target.closest('.zoom')?.classList.toggle('large'))"

SavedPart = Mapping[str, Any]
"""A part of a saved message: its "text", or the "modality", "caption", "file" and "size" of a
medium; audio has a "spectrogram" instead of a size."""
SavedMessage = Mapping[str, Any]
"""A saved message: {"role", "parts"}."""


@dataclass(frozen=True)
class GalleryEntry:
    """One conversation of the page.

    Attributes:
        messages: its turns.
        note: a line below it.
    """

    messages: tuple[Message, ...]
    note: str = ""


def write_gallery(
    folder: Path, title: str, entries: Sequence[GalleryEntry], intro: str = ""
) -> Path:
    """Write a page that shows conversations, index.html, and their media next to it.

    Clips are animated WebP, sounds WAV with an image of their spectrogram. gallery.json holds the
    same entries for programs (`read_gallery`).

    Args:
        folder: the folder to write to, which is made.
        title: the page's title.
        entries: the conversations, each with a note.
        intro: a sentence below the title.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = [_save(folder, f"{number:03d}", entry) for number, entry in enumerate(entries)]
    articles = [f"<article>{entry_html(messages, note)}</article>" for messages, note in saved]
    (folder / SAVED).write_text(json.dumps(saved), encoding="utf-8")
    page = folder / "index.html"
    body = f'<div class="masonry">{"".join(articles)}</div>'
    page.write_text(page_html(title, body, intro), encoding="utf-8")
    return page


def write_comparison(
    folder: Path, title: str, columns: Mapping[str, Sequence[GalleryEntry]], intro: str = ""
) -> Path:
    """Write a page that shows what several models answer to the same prompts, side by side.

    Args:
        folder: the folder to write to, which is made.
        title: the page's title.
        columns: heading -> the model's conversations; the first message of the i-th conversation is
            the i-th prompt of all columns.
        intro: a sentence below the title.

    Returns:
        The path of the page, index.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        heading: [
            _save(folder, f"{column}-{number:03d}", entry)[0]
            for number, entry in enumerate(entries)
        ]
        for column, (heading, entries) in enumerate(columns.items())
    }
    page = folder / "index.html"
    page.write_text(page_html(title, comparison_html(saved), intro), encoding="utf-8")
    return page


def read_gallery(folder: Path) -> list[Sequence[SavedMessage]]:
    """Return the conversations that `write_gallery` saved; none if the folder has no gallery."""
    file = folder / SAVED
    if not file.is_file():
        return []
    return [messages for messages, _ in json.loads(file.read_text(encoding="utf-8"))]


def comparison_html(columns: Mapping[str, Sequence[Sequence[SavedMessage]]]) -> str:
    """Return a table of conversations with the same prompts: a row a prompt, a column a heading."""
    heads = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in columns)
    rows = []
    for conversations in zip(*columns.values(), strict=True):
        replies = ("".join(map(message_html, replies)) for _, *replies in conversations)
        cells = "".join(f"<td>{reply}</td>" for reply in replies)
        rows.append(f'<tr><th scope="row">{message_html(conversations[0][0])}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0"><table class="compared">'
        f'<thead><tr><th scope="col">Prompt</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def entry_html(messages: Sequence[SavedMessage], note: str = "") -> str:
    """Return the HTML of a conversation, each message under the name of its speaker.

    Args:
        messages: the messages as `write_gallery` saved them.
        note: a line of text below the conversation; empty: none.
    """
    names = {"user": "You", "assistant": "Model", "system": "System"}
    lines = [
        f'<p class="speaker">{names[message["role"]]}</p>{message_html(message)}'
        for message in messages
    ]
    return "".join(lines) + (f'<p class="quiet">{html.escape(note)}</p>' if note else "")


def message_html(message: SavedMessage) -> str:
    """Return the HTML of a saved message."""
    return "".join(map(_part_html, message["parts"]))


def page_html(title: str, body: str, intro: str = "") -> str:
    """Return a whole page: light and dark, for large and small screens, without other files.

    Args:
        title: the page's title, as text.
        body: the HTML of its contents.
        intro: a paragraph of text below the title; empty: none.
    """
    intro = f"<p>{html.escape(intro)}</p>" if intro else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{intro}<main>{body}</main><script>{_SCRIPT}</script></html>"
    )


def spectrogram(audio: Audio) -> Image:
    """Return a spectrogram as an image: time to the right, linear frequency upwards, 70 dB of
    range.

    Args:
        audio: the audio, whose channels are averaged.
    """
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


def _save(folder: Path, name: str, entry: GalleryEntry) -> tuple[list[SavedMessage], str]:
    """Save the media of an entry; return it with the names of their files."""
    messages: list[SavedMessage] = []
    for turn, message in enumerate(entry.messages):
        parts = [
            {"text": part.text}
            if isinstance(part, Text)
            else _save_medium(folder, f"{name}-{turn}-{place}", part)
            for place, part in enumerate(message.parts)
        ]
        messages.append({"role": message.role, "parts": parts})
    return messages, entry.note


def _save_medium(folder: Path, name: str, medium: Medium) -> SavedPart:
    saved: dict[str, Any] = {"modality": medium.modality, "caption": medium.caption or ""}
    if not medium.has_data:
        return saved
    if isinstance(medium, Audio):
        medium.save(folder / f"{name}.wav")
        spectrogram(Audio.from_numpy(medium.to_numpy(), 1)).save(folder / f"{name}.png")
        return {**saved, "file": f"{name}.wav", "spectrogram": f"{name}.png"}
    file = f"{name}.{'webp' if isinstance(medium, Video) else 'png'}"
    medium.save(folder / file)
    height, width = medium.to_numpy().shape[-3:-1]
    return {**saved, "file": file, "size": [width, height]}


def _part_html(part: SavedPart) -> str:
    if "text" in part:
        return f"<p>{html.escape(part['text'])}</p>"
    caption = html.escape(part["caption"])
    if "file" not in part:
        return f"<p>[{part['modality']}: {caption}]</p>"
    url = part["file"]
    if part["modality"] == "audio":
        return (
            f'<figure><img class="spectrogram" src="{part["spectrogram"]}" alt="spectrogram">'
            f'<audio controls preload="none" src="{url}"></audio></figure>'
        )
    width, height = part["size"]
    small = ' class="small"' if max(width, height) < _SMALL else ""
    return (
        f'<figure><button type="button" class="zoom" aria-label="Enlarge">'
        f'<img{small} src="{url}" alt="{caption}"></button>'
        f"<figcaption>{width} x {height} pixels</figcaption></figure>"
    )
