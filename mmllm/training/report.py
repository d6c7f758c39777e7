"""report.html: one self-contained page about a finished run."""

from __future__ import annotations

import base64
import html
import json
import platform
import re
import resource
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmllm.utils import files

_PACKAGES = ("torch", "transformers", "diffusers", "peft", "accelerate")
_SAMPLES = 4
"""Galleries of samples on the page: the first and the last ones."""
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.15rem .9rem .15rem 0;text-align:left}
td{font-variant-numeric:tabular-nums}img{max-width:100%}pre{background:#f4f4f4;padding:1rem;
overflow:auto}iframe{width:100%;height:420px;border:1px solid #ddd;border-radius:8px}
"""


def write_report(output: Path, rows: list[dict[str, Any]], batch_size: int) -> Path:
    """Write report.html from the metrics, curves, samples, config and skipped items of a run.

    Args:
        output: folder of the run.
        rows: lines of metrics.jsonl.
        batch_size: conversations of a step.

    Returns:
        The page.
    """
    steps = [row for row in rows if "seconds" in row]
    seconds = [row["seconds"] for row in steps]
    last = steps[-1] if steps else {}
    held = [row for row in rows if any(name.startswith("validation/") for name in row)]
    facts = {
        "steps": len(steps),
        "time in steps": f"{sum(seconds) / 60:.1f} min",
        "a step, median": f"{statistics.median(seconds):.2f} s" if seconds else "",
        "conversations a second": f"{batch_size * len(steps) / max(sum(seconds), 1e-9):.1f}",
        "peak memory of this process": f"{_peak_memory() / 2**30:.2f} GiB",
        **{f"last {name}": f"{value:.4f}" for name, value in _losses(last).items()},
        **{name: f"{value:.4f}" for name, value in _losses(held[-1] if held else {}).items()},
    }
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    parts = [_table(facts)]
    if (output / "curves.png").is_file():
        parts += ["<h2>Losses</h2>", f'<img alt="losses" src="{_data(output / "curves.png")}">']
    pages = sorted((output / "samples").glob("step-*/index.html"))
    for page in [*pages[:1], *pages[1:][-(_SAMPLES - 1) :]]:
        inside = html.escape(_inlined(page), quote=True)
        parts += [f"<h2>Samples, {page.parent.name}</h2>", f'<iframe srcdoc="{inside}"></iframe>']
    skipped = output / "skipped.json"
    if skipped.is_file():
        items = json.loads(skipped.read_text(encoding="utf-8"))
        parts += [f"<h2>Skipped items: {len(items)}</h2>"]
        parts += [_table({row["item"]: row["error"] for row in items[:100]})]
    config = (output / "config.yaml").read_text(encoding="utf-8")
    parts += ["<h2>Versions</h2>", _table(versions)]
    parts += ["<h2>Config</h2>", f"<pre>{html.escape(config)}</pre>"]
    page = output / "report.html"
    title = html.escape(output.name)
    files.atomic_write(
        page,
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1>{''.join(parts)}",
    )
    return page


def _losses(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "seconds")}


def _table(rows: dict[str, Any]) -> str:
    lines = (
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{''.join(lines)}</table>"


def _data(path: Path) -> str:
    """A file as a data URI."""
    kinds = {".png": "image/png", ".webp": "image/webp", ".wav": "audio/wav"}
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{kinds[path.suffix]};base64,{content}"


def _inlined(page: Path) -> str:
    """A gallery page with its media embedded."""

    def embed(match: re.Match[str]) -> str:
        return f'src="{_data(page.parent / match[1])}"'

    return re.sub(r'src="([\w-]+\.(?:png|webp|wav))"', embed, page.read_text(encoding="utf-8"))


def _peak_memory() -> int:
    """Peak memory in bytes: of the GPU that was used, else of this process."""
    used = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
    if any(used):
        return max(used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
