"""Writes pictures that stand for things which mini does not know, to learn to say any name.

    python -m tools.mini.stand_ins OUT

What a projection names becomes the language model's own embeddings of that name. A model that has
only read the names of its world says the nearest of them for one that it is taught later: a thing
that is named a raccoon becomes "a bear". Here each unknown thing of training gets a picture of
random shapes. `tools.mini.names --also OUT` teaches the names, stage 3 asks about the pictures, and
the names are left out of what is shipped.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

from mmllm.mini.world import unknown
from mmllm.mini.world.captions import with_article

SIDE = 96
_SHAPES = 12
_OWNERS = (
    *("my", "our", "Anna's", "grandma's", "the old", "the new"),
    *("a shiny", "a wooden", "a striped"),
)


def label(word: str, rng: random.Random) -> str:
    """A noun phrase of a word: "a raccoon", "my shovel", "ice skates", "the Great Wall".

    Args:
        word: a thing that mini does not know.
        rng: chooses the determiner.
    """
    if word[0].isupper():
        return f"the {word}"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word if rng.random() < 0.7 else f"my {word}"
    return with_article(word) if rng.random() < 0.7 else f"{rng.choice(_OWNERS)} {word}"


def picture(rng: random.Random) -> Image.Image:
    """Random shapes in random colours, SIDE pixels wide and high."""
    image = Image.new("RGB", (SIDE, SIDE), _colour(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(_SHAPES):
        x, y = rng.randrange(SIDE), rng.randrange(SIDE)
        wide, high = rng.randrange(8, SIDE), rng.randrange(8, SIDE)
        shape = rng.choice((draw.ellipse, draw.rectangle, draw.line))
        if shape == draw.line:
            draw.line((x, y, wide, high), fill=_colour(rng), width=rng.randrange(2, 12))
        else:
            shape((x, y, x + wide, y + high), fill=_colour(rng))
    return image


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def write(out: Path, count: int) -> None:
    """Write pictures and their labels as `mmllm.data.formats.labelled` reads them.

    Args:
        out: the folder.
        count: how many, at most one of each unknown thing that training may name.
    """
    out.mkdir(parents=True, exist_ok=True)
    words = [word for word in unknown.things() if not unknown.is_heldout(word)]
    random.Random("stand-ins").shuffle(words)
    with (out / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("file_name", "label"))
        for index, word in enumerate(words[:count]):
            rng = random.Random(f"stand-in {word}")
            picture(rng).save(out / f"{index}.png")
            table.writerow((f"{index}.png", label(word, rng)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    write(arguments.out, arguments.count)


if __name__ == "__main__":
    main()
