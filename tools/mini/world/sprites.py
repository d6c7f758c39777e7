"""Cuts the sprites of mini's world from the npm package of the 3-D emoji.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 --pack-destination DIR
    python -m tools.mini.world.sprites DIR

In: `mmllm/mini/data/things.json`, chosen and named by hand. Out: `mmllm/mini/data/things/ID.webp`,
112 x 112 pixels with an alpha channel, the longer side of the thing filling the square.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from mmllm.mini.world.things import DATA, SPRITE, things
from tools.mini.data.pictures import renders

QUALITY = 82


def cut(image: Image.Image) -> Image.Image:
    """The visible part of an RGBA image, centred in a square of SPRITE pixels."""
    box = image.getchannel("A").point([0] * 17 + [255] * 239).getbbox()
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cuts the sprites of mini's world.")
    parser.add_argument("packages", type=Path, help="folder with the .tgz file of `npm pack`")
    draw = renders(parser.parse_args().packages)
    folder = DATA / "things"
    folder.mkdir(exist_ok=True)
    for thing in things().values():
        file = folder / f"{thing.id}.webp"
        cut(draw(thing.emoji)).save(file, quality=QUALITY, method=6, alpha_quality=100)
    for stale in folder.glob("*.webp"):
        if stale.stem not in things():
            stale.unlink()


if __name__ == "__main__":
    main()
