"""Render the emoji pictures of `mini`'s data from the npm packages that hold them.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6 \
        @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 --pack-destination DIR
    pip install resvg-py==0.5.0
    python -m tools.mini.data.pictures DIR

In: `mmllm/mini/data/concepts.json`, chosen and named by hand, and the packed packages in DIR.
Out: `pictures/<style>/<id>.webp` (96 px, RGB on white) and the image rows of `items.json.gz`.
The names and captions are checked first: each must name one concept only.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from mmllm import mini
from mmllm.data.sources import read_text, write_text

DATA = mini.FOLDER / "data"
SIZE = 96  # pixels, both sides
QUALITY = 85
HELDOUT_STYLE = "twemoji"  # of another hand than the others: the two Fluent styles are sisters
ICON_SETS = {
    "fluent-flat": "fluent-emoji-flat",
    "noto": "noto",
    HELDOUT_STYLE: "twemoji",
}

log = logging.getLogger("pictures")


def main() -> None:
    """Check the names, render every style, list the files."""
    parser = argparse.ArgumentParser(description="Renders the emoji pictures of mini.")
    parser.add_argument("packages", type=Path, help="folder with the .tgz files of `npm pack`")
    packages = parser.parse_args().packages
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    concepts = json.loads((DATA / "concepts.json").read_text("utf-8"))
    check_names(concepts, json.loads((DATA / "captions.json").read_text("utf-8")))

    drawings = {"fluent-3d": renders(packages)}
    drawings |= {style: icons(packages, name) for style, name in ICON_SETS.items()}
    items = [item for style, draw in drawings.items() for item in write(style, draw, concepts)]
    write_items("image", items)


def check_names(concepts: list[dict], captions: dict) -> None:
    """Raise unless every label, synonym and caption names its own concept and no other.

    The rule by which a reply is read: whole words, case ignored, the longest name wins. So "bell"
    and "bell pepper" may be two concepts, but "apple" may not be one along with two kinds of apple.
    """
    owner: dict[str, str] = {}
    for concept in concepts:
        for name in (
            concept["label"],
            *concept["synonyms"],
            *concept["heldout_synonyms"],
        ):
            taken = owner.setdefault(name.lower(), concept["id"])
            if taken != concept["id"]:
                raise ValueError(f"{name!r} names both {taken} and {concept['id']}")
    if len({concept["id"] for concept in concepts}) != len(concepts):
        raise ValueError("concepts.json: an id occurs twice")

    by_length = sorted(owner, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, by_length))})(?!\w)")
    templates = [t for kind in captions.values() for split in kind.values() for t in split]
    for concept in concepts:
        names = (concept["label"], *concept["synonyms"], *concept["heldout_synonyms"])
        phrases = [*names, *(t.format(caption=concept["caption"]) for t in templates)]
        for phrase in phrases:
            found = {owner[name] for name in pattern.findall(phrase.lower())}
            if found != {concept["id"]}:
                raise ValueError(f"{phrase!r} names {sorted(found)}, not {concept['id']} alone")


def renders(packages: Path) -> Callable[[str], Image.Image]:
    """The 3-D renders: an emoji's code point -> its RGBA picture of 256 px."""
    files = {}
    with tarfile.open(package(packages, "lobehub-fluent-emoji-3d")) as archive:
        for member in archive:
            if member.name.endswith(".webp"):
                files[plain(Path(member.name).stem)] = read_member(archive, member)
    return lambda emoji: Image.open(io.BytesIO(files[emoji])).convert("RGBA")


def icons(packages: Path, name: str) -> Callable[[str], Image.Image]:
    """An Iconify set of SVG bodies: an emoji's code point -> its RGBA picture of 4 x SIZE px."""
    resvg_py: Any = importlib.import_module("resvg_py")  # of the extra `data`

    with tarfile.open(package(packages, f"iconify-json-{name}")) as archive:
        icon_set = json.loads(read_member(archive, "package/icons.json"))
        chars = json.loads(read_member(archive, "package/chars.json"))
    names = {plain(char): icon for char, icon in chars.items()}

    def draw(emoji: str) -> Image.Image:
        icon = names[emoji]
        icon = icon_set.get("aliases", {}).get(icon, {}).get("parent", icon)
        body = icon_set["icons"][icon]
        width = body.get("width", icon_set.get("width", 16))
        height = body.get("height", icon_set.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{4 * SIZE}" height="{4 * SIZE}">'
            f"{body['body']}</svg>"
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        return Image.open(io.BytesIO(png)).convert("RGBA")

    return draw


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    """The bytes of a regular file in an archive."""
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{archive.name}: {member} is no file")
    return file.read()


def write(style: str, draw: Callable[[str], Image.Image], concepts: list[dict]) -> list[dict]:
    """One picture per concept, and its rows for the list of items."""
    folder = DATA / "pictures" / style
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.webp"):
        stale.unlink()
    items, size = [], 0
    for concept in concepts:
        path = folder / f"{concept['id']}.webp"
        picture = on_white(draw(concept["emoji"])).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        picture.save(path, quality=QUALITY, method=6)
        size += path.stat().st_size
        split = concept["split"]
        if split == "train" and style == HELDOUT_STYLE:
            split = "heldout_style"
        items.append(
            {
                "file": path.relative_to(DATA).as_posix(),
                "modality": "image",
                "concept": concept["id"],
                "style": style,
                "split": split,
            }
        )
    log.info("%s: %d pictures, %.2f MB", style, len(items), size / 1e6)
    return items


def on_white(picture: Image.Image) -> Image.Image:
    """RGBA -> RGB on a white ground."""
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return ground.convert("RGB")


def package(packages: Path, prefix: str) -> Path:
    """The one file of `npm pack` whose name starts with prefix and a version."""
    found = sorted(packages.glob(f"{prefix}-[0-9]*.tgz"))
    if len(found) != 1:
        raise ValueError(f"{packages}: expected one {prefix}-VERSION.tgz, found {len(found)}")
    return found[0]


def plain(emoji: str) -> str:
    """A hexadecimal code point sequence without the variation selector, in lower case."""
    return "-".join(point for point in emoji.lower().split("-") if point != "fe0f")


def write_items(modality: str, items: list[dict]) -> None:
    """Replace the rows of one modality in the list of items and keep the others."""
    path = DATA / "items.json.gz"
    kept = json.loads(read_text(path)) if path.exists() else []
    rows = [row for row in kept if row["modality"] != modality] + items
    rows.sort(key=lambda row: ("image", "video", "audio").index(row["modality"]))
    write_rows(path, rows)


def write_rows(path: Path, rows: list[dict]) -> None:
    """A JSON list, one row a line, so that a change shows as one line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
