"""A page of what the shipped model knows, with a picture of every thing."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from mmllm.gallery import page_html
from mmllm.mini.concepts import known_concepts
from mmllm.mini.world.things import DATA, colourable, things

_STYLE = """
ul.things { display: grid; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); gap: .5rem;
  padding: 0; list-style: none; text-align: center; overflow-wrap: anywhere }
ul.things img { width: 3.5rem; height: 3.5rem; display: block; margin: auto }
"""


def write_page(file: Path) -> Path:
    """Write a page with a picture of every thing, and the names of the rest; it is one file.

    Args:
        file: where; its folder is made.
    """
    painted = set(colourable())
    in_colours, others = [], []
    for thing in sorted(things().values(), key=lambda thing: thing.label):
        sprite = base64.b64encode((DATA / "things" / f"{thing.id}.webp").read_bytes()).decode()
        entry = f'<li><img alt="" src="data:image/webp;base64,{sprite}">{html.escape(thing.label)}'
        (in_colours if thing.id in painted else others).append(entry)
    known = known_concepts()
    sections = (
        (f"Things in any of its colours ({len(in_colours)})", _grid(in_colours)),
        (f"Things that keep theirs ({len(others)})", _grid(others)),
        *(
            (f"{title} ({len(known[kind])})", f"<p>{html.escape(', '.join(known[kind]))}</p>")
            for kind, title in (("colour", "Colours"), ("motion", "Motions"), ("audio", "Sounds"))
        ),
    )
    body = "".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in sections)
    intro = (
        "Up to four things in a picture, one or two in a clip, one or two sounds after another or "
        "together."
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    page = page_html("What mini knows", f"<style>{_STYLE}</style>{body}", intro)
    file.write_text(page, encoding="utf-8")
    return file


def _grid(entries: list[str]) -> str:
    return f'<ul class="things">{"".join(entries)}</ul>'
