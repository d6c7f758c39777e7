"""A page of what a model answers: pictures, clips, sounds and words, in every direction.

    python demos/gallery.py --model mini --folder runs/gallery [--seed 0] [--prompts FILE]

FILE holds one prompt a line. Without it the prompts below are asked, and the media that come of
them are shown to the model again.
"""

import argparse
from pathlib import Path

import mmllm
from mmllm import console, user
from mmllm.gallery import GalleryEntry, write_gallery

PROMPTS = (
    "Draw a red apple.",
    "Draw a cat.",
    "Show me a picture of a rocket.",
    "Please draw a snowman.",
    "Make a clip of a dancing robot.",
    "Animate a heart.",
    "Play the sound of a bell.",
    "What does a dog sound like? Play it.",
    "Draw a guitar and play its sound.",
    "Describe what an apple looks like.",
    "What is the capital of France?",
)
QUESTION = "What is this?"


def main() -> None:
    options = arguments()
    console.set_up_logging()
    prompts = PROMPTS
    if options.prompts:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
        prompts = tuple(line for line in lines if line.strip())

    chat = mmllm.load(options.model)
    asked = [[user(prompt)] for prompt in prompts]
    replies = chat.reply_many(
        asked, seeds=[options.seed] * len(asked), on_step=console.show_progress
    )
    made = [medium for reply in replies for medium in reply.media]
    entries = [
        GalleryEntry((turn[0], reply.message)) for turn, reply in zip(asked, replies, strict=True)
    ]
    if made:
        shown = [[user(QUESTION, medium)] for medium in made]
        answers = chat.reply_many(
            shown, seeds=[options.seed] * len(shown), modalities=words_only(chat)
        )
        entries += [
            GalleryEntry((turn[0], answer.message), "made by the model itself")
            for turn, answer in zip(shown, answers, strict=True)
        ]

    page = write_gallery(options.folder, f"{chat.model.config.name}: {options.model}", entries)
    console.echo(f"{page}: {len(entries)} exchanges, {len(made)} media")


def words_only(chat: mmllm.Chat) -> dict:
    return dict.fromkeys(chat.model.renderer.output_keys, "forbid")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
