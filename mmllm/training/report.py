"""report.html: one self-contained page about a finished run."""

from __future__ import annotations

import base64
import html
import json
import platform
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmllm.gallery import SavedMessage, comparison_html, page_html, read_gallery
from mmllm.training.curves import loss_names, panels, title_of
from mmllm.utils import files

_PACKAGES = ("torch", "transformers", "diffusers", "peft", "accelerate")
_SAMPLES = 4
"""Steps whose samples are on the page, the first and the last among them."""
_STYLE = """
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr));gap:.5rem}
.grid img{width:100%}
@media (prefers-color-scheme:dark){.grid img{filter:invert(1) hue-rotate(180deg)}}
.facts{border-collapse:collapse}.facts td,.facts th{padding:.15rem .9rem .15rem 0;text-align:left}
.facts td{font-variant-numeric:tabular-nums}pre{overflow:auto;font-size:13px}
summary{cursor:pointer;margin-top:1.5rem;font-size:1.15rem;font-weight:600}
"""


def write_report(output: Path, rows: list[dict[str, Any]], batch_size: int) -> Path:
    """Write report.html: losses, samples over the steps, speed and memory, skipped items, config.

    Args:
        output: folder of the run.
        rows: lines of metrics.jsonl.
        batch_size: conversations of a step.

    Returns:
        The page.
    """
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    parts = [f"<style>{_STYLE}</style>"]
    if loss_names(rows):
        parts += ["<h2>Losses</h2>", _losses(rows)]
    if samples := _samples(output / "samples"):
        parts += ["<h2>Samples over the steps</h2>", comparison_html(samples)]
    facts = {
        "steps": len(seconds),
        "time in steps": f"{sum(seconds) / 60:.1f} min",
        "median time of a step": f"{statistics.median(seconds):.2f} s" if seconds else "",
        "conversations a second": f"{batch_size * len(seconds) / max(sum(seconds), 1e-9):.1f}",
        "peak memory of this process": f"{_peak_memory() / 2**30:.2f} GiB",
    }
    parts += ["<h2>Speed and memory</h2>", _table(facts.items())]
    skipped = output / "skipped.json"
    if skipped.is_file():
        items = json.loads(skipped.read_text(encoding="utf-8"))
        parts += [f"<h2>Skipped items: {len(items)}</h2>"]
        parts += [_table((row["item"], row["error"]) for row in items[:100])]
    config = (output / "config.yaml").read_text(encoding="utf-8")
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    parts += [
        f"<details><summary>Versions</summary>{_table(versions.items())}</details>",
        f"<details><summary>Config</summary><pre>{html.escape(config)}</pre></details>",
    ]
    page = output / "report.html"
    files.atomic_write(page, page_html(output.name, "".join(parts)))
    return page


def _losses(rows: list[dict[str, Any]]) -> str:
    """Return the curves in a grid, and a table of their ends."""
    grid = "".join(
        f'<img alt="curve of {html.escape(title)}" src="{_data_uri("image/svg+xml", image)}">'
        for title, image in panels(rows).items()
    )
    lines: list[tuple[str, ...]] = [("loss", "first step", "last step", "held out, last")]
    for name in loss_names(rows):
        values = [row[name] for row in rows if name in row]
        held_out = [row[f"validation/{name}"] for row in rows if f"validation/{name}" in row]
        shown = [f"{value:.3f}" for value in (values[0], values[-1], *held_out[-1:])]
        lines.append((title_of(name), *shown))
    return f'<div class="grid">{grid}</div>{_table(lines)}'


def _samples(folder: Path) -> dict[str, list[Sequence[SavedMessage]]]:
    """Return the heading of a step -> its samples with their media embedded, of steps that are
    evenly spaced and answered the same prompts as the last one."""
    galleries = {step: read_gallery(step) for step in sorted(folder.glob("step-*"))}

    def prompts(gallery: Sequence[Sequence[SavedMessage]]) -> list[str]:
        return [
            "".join(part.get("text", part.get("modality", "")) for part in messages[0]["parts"])
            for messages in gallery
        ]

    last = prompts(list(galleries.values())[-1]) if galleries else []
    alike = [step for step, gallery in galleries.items() if last and prompts(gallery) == last]
    chosen = dict.fromkeys(np.linspace(0, len(alike) - 1, _SAMPLES).round().astype(int))
    return {
        f"step {int(step.name.removeprefix('step-'))}": [
            [_embedded(step, message) for message in messages] for messages in galleries[step]
        ]
        for step in (alike[index] for index in chosen if alike)
    }


def _embedded(folder: Path, message: SavedMessage) -> SavedMessage:
    """Return a message of a gallery with data URIs instead of the names of files."""
    kinds = {".png": "image/png", ".webp": "image/webp", ".wav": "audio/wav"}

    def embed(part: Mapping[str, Any]) -> dict[str, Any]:
        named = {key: folder / part[key] for key in ("file", "spectrogram") if key in part}
        uris = {key: _data_uri(kinds[f.suffix], f.read_bytes()) for key, f in named.items()}
        return {**part, **uris}

    return {**message, "parts": [embed(part) for part in message["parts"]]}


def _table(rows: Any) -> str:
    """Return rows of cells as an HTML table; the first cell of each is its heading."""
    lines = (
        f'<tr><th scope="row">{html.escape(str(name))}</th>'
        + "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        + "</tr>"
        for name, *values in rows
    )
    return f'<div class="scroll"><table class="facts">{"".join(lines)}</table></div>'


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _peak_memory() -> int:
    """Peak memory in bytes: of the GPU that was used, else of this process."""
    used = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
    if any(used):
        return max(used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
