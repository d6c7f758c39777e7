"""One moving picture of what a model draws, animates and plays: the picture in the README.

    python demos/sheet.py --model mini --out docs/mini.webp [--seed 0]

Every prompt is asked once, all with the same seed. Clips move; a line passes over the spectrograms
of sounds at the speed of playback.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import mmllm
from mmllm import Audio, Video, console, user
from mmllm.conversation import Medium
from mmllm.gallery import spectrogram

PROMPTS = (
    "Draw a dog.",
    "Two red apples, please.",
    "Draw a cat to the left of a tree.",
    "Can I see a blue guitar?",
    "Sketch three penguins.",
    "A purple car above a house.",
    "Animate a rocket moving up.",
    "Play the sound of a trumpet.",
    "Paint a pumpkin and a carrot.",
    "Make a clip of a fish moving to the right.",
    "Let me hear a church bell and then a dog.",
    "Draw a green dinosaur.",
)
COLUMNS, CELL, LINE = 6, 168, 34
FRAMES, FPS = 16, 8
"""Of the moving picture: two seconds, as long as the sounds."""


def main() -> None:
    options = arguments()
    console.set_up_logging()
    chat = mmllm.load(options.model)
    replies = chat.reply_many(
        [[user(prompt)] for prompt in PROMPTS], seeds=[options.seed] * len(PROMPTS)
    )
    rows = -(-len(PROMPTS) // COLUMNS)
    pages = [
        Image.new("RGB", (COLUMNS * CELL, rows * (CELL + 2 * LINE)), "white") for _ in range(FRAMES)
    ]
    for number, (prompt, reply) in enumerate(zip(PROMPTS, replies, strict=True)):
        left, top = number % COLUMNS * CELL, number // COLUMNS * (CELL + 2 * LINE)
        for page, moment in zip(pages, moments(prompt, reply.text, reply.media), strict=True):
            page.paste(moment, (left, top))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pages[0].save(
        options.out,
        save_all=True,
        append_images=pages[1:],
        duration=1000 // FPS,
        loop=0,
        quality=80,
        method=6,
    )
    console.echo(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


def moments(prompt: str, text: str, media: list[Medium]) -> list[Image.Image]:
    """The prompt, the first medium, and the words of the reply, at each frame."""
    blank = Image.new("RGB", (CELL, CELL + 2 * LINE), "white")
    pen = ImageDraw.Draw(blank)
    for line, y, colour in ((prompt, LINE // 2, "#555555"), (text, CELL + LINE * 3 // 2, "black")):
        font = ImageFont.load_default(12)
        font = ImageFont.load_default(12 * min(1.0, (CELL - 6) / pen.textlength(line, font)))
        pen.text((CELL // 2, y), line, colour, font, anchor="mm")
    tiles = frames_of(media[0]) if media else []
    cells = []
    for frame in range(FRAMES):
        cell = blank.copy()
        if tiles:
            cell.paste(tiles[frame % len(tiles)], (8, LINE + 8))
        cells.append(cell)
    return cells


def frames_of(medium: Medium) -> list[Image.Image]:
    """One tile for an image, one a frame for a clip, and FRAMES for a sound."""
    side = CELL - 16
    if isinstance(medium, Audio):
        picture = spectrogram(medium).to_pil().resize((side, side), Image.Resampling.LANCZOS)
        tiles = [picture.copy() for _ in range(FRAMES)]
        for frame, tile in enumerate(tiles):
            x = side * frame // FRAMES
            ImageDraw.Draw(tile).line([(x, 0), (x, side)], "white", 2)
        return tiles
    if isinstance(medium, Video):
        return [
            Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS)
            for frame in medium.to_numpy()
        ]
    return [medium.to_pil().resize((side, side), Image.Resampling.LANCZOS)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--out", type=Path, default=Path("docs/mini.webp"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
