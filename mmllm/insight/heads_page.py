"""A page of attention heads: the map of their scores over layers, and what the model loses without
the strongest."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

from mmllm.gallery import STYLE
from mmllm.insight.heads import HeadTable
from mmllm.utils.files import atomic_write

_SCORES = {
    "prefix_matching": "attention from a token to those behind its earlier occurrences",
    "previous_token": "attention to the token before",
}
_STYLE = (
    STYLE
    + """
.heads{border-collapse:collapse;font-size:11px}.heads th{font-weight:400;color:var(--quiet);
padding:0 .4rem;text-align:right}.heads td{width:2.2rem;height:1.1rem;text-align:center;
border:1px solid var(--page)}.loss td,.loss th{padding:.2rem .8rem;text-align:left}
"""
)


def write_heads_page(
    file: Path, title: str, table: HeadTable, losses: Mapping[str, tuple[float, float]]
) -> None:
    """Write the page, one file that asks no other host.

    Args:
        file: where.
        title: its title.
        table: the scores.
        losses: what is ablated -> mean loss of repeated tokens, and half of its 95 % interval.
    """
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{loss:.2f} ± {half:.2f}</td></tr>"
        for name, (loss, half) in losses.items()
    )
    maps = "".join(
        f"<h2>{html.escape(name.replace('_', ' ').capitalize())}</h2>"
        f"<p class=quiet>{text}</p>{_map(table, name)}"
        for name, text in _SCORES.items()
    )
    atomic_write(
        file,
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        "<h2>Loss of random tokens where they stand for the second time</h2>"
        f"<table class=loss>{rows}</table>{maps}</html>",
    )


def _map(table: HeadTable, name: str) -> str:
    """One row for each layer, one cell for each head."""
    cells: dict[int, str] = {}
    for score in table.scores:
        value = getattr(score, name)
        label = f"{value:.2f}".removeprefix("0") if value >= 0.1 else ""
        colour = f"color-mix(in srgb,#e8590c {100 * min(max(value, 0), 1):.0f}%,var(--card))"
        cells[score.layer] = cells.get(score.layer, "") + (
            f'<td style="background:{colour}" title="{score.name}: {value:.3f}">{label}</td>'
        )
    rows = "".join(f"<tr><th>{layer}</th>{row}</tr>" for layer, row in sorted(cells.items()))
    return f"<div class=scroll tabindex=0><table class=heads>{rows}</table></div>"
