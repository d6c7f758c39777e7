"""One picture of what a model draws, animates and plays: the picture in the README.

    python demos/sheet.py --model mini --out docs/mini.webp [--seed 0]

Every prompt is asked once, all with the same seed.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import mmllm
from mmllm import Audio, Video, console, user
from mmllm.conversation import Medium
from mmllm.gallery import spectrogram

IMAGE_PROMPTS = (
    "Draw a dog.",
    "Draw a goat.",
    "Paint a rainbow.",
    "I'd like to see a microphone.",
    "Sketch a tractor, please.",
    "Draw a magnet.",
    "Show me a pumpkin.",
    "Draw a clown.",
)
OTHER_PROMPTS = (
    "Animate a penguin.",
    "Play the sound of a trumpet.",
    "Animate an alarm clock.",
    "Play the sound of an ambulance.",
)
CELL, LINE, FRAMES = 144, 34, 4


def main() -> None:
    options = arguments()
    console.set_up_logging()
    chat = mmllm.load(options.model)
    prompts = IMAGE_PROMPTS + OTHER_PROMPTS
    replies = chat.reply_many(
        [[user(prompt)] for prompt in prompts], seeds=[options.seed] * len(prompts)
    )
    cells = [
        cell(prompt, reply.text, reply.media, 1 if prompt in IMAGE_PROMPTS else 2)
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    page = Image.new("RGB", (8 * CELL, 2 * (CELL + 2 * LINE)), "white")
    x = y = 0
    for image in cells:
        page.paste(image, (x, y))
        x += image.width
        if x >= page.width:
            x, y = 0, y + image.height
    options.out.parent.mkdir(parents=True, exist_ok=True)
    page.save(options.out, quality=90)
    console.echo(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


def cell(prompt: str, text: str, media: list[Medium], width: int) -> Image.Image:
    """The prompt, the reply's first medium and its text."""
    image = Image.new("RGB", (width * CELL, CELL + 2 * LINE), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(11)
    middle = image.width // 2
    pen.text((middle, LINE // 2), prompt, "#555555", font, anchor="mm")
    scale = width * CELL / pen.textlength(text, font)
    small = ImageFont.load_default(11 * min(1.0, scale))
    pen.text((middle, CELL + LINE + LINE // 2), text, "black", small, anchor="mm")
    for x, tile in tiles(media[0]) if media else []:
        image.paste(tile, (x, LINE + (CELL - tile.height) // 2))
    return image


def tiles(medium: Medium) -> list[tuple[int, Image.Image]]:
    """Where to paste what: a picture, frames of a clip in a row, or a spectrogram."""
    if isinstance(medium, Audio):
        picture = spectrogram(medium).to_pil()
        return [(8, picture.resize((2 * CELL - 16, CELL - 24), Image.Resampling.LANCZOS))]
    if isinstance(medium, Video):
        frames = medium.to_numpy()[:: max(len(medium.to_numpy()) // FRAMES, 1)][:FRAMES]
        side = 2 * CELL // FRAMES
        return [
            (place * side, Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS))
            for place, frame in enumerate(frames)
        ]
    return [(8, medium.to_pil().resize((CELL - 16, CELL - 16), Image.Resampling.LANCZOS))]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--out", type=Path, default=Path("docs/mini.webp"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
