"""A page of what a model answers, next to what another one does: images, video, audio and text.

    python demos/gallery.py --model RUN [--compare mini] [--scores RUN/evaluation.json]
        [--folder runs/gallery] [--seed 0] [--prompts FILE]

FILE holds one prompt a line; without it the prompts below are asked. A model is also shown the
first medium of each of its replies.
"""

import argparse
from pathlib import Path

import mmllm
from mmllm import console, user
from mmllm.checkpoints import open_checkpoint
from mmllm.evaluation.report import EvaluationReport
from mmllm.gallery import GalleryEntry, write_comparison

PROMPTS = (
    "Draw a red apple.",
    "Draw two cats.",
    "Draw a blue car and a tree.",
    "Show me a rocket.",
    "Please draw a guitar.",
    "Animate a rocket.",
    "Animate a ghost.",
    "Play the sound of a church bell.",
    "Play the sound of a flute.",
    "Draw a drum and let me hear it.",
    "Describe what an apple looks like.",
    "What is the capital of France?",
)
"""Of things that are in the data of the demo."""
QUESTION = "What is this?"
ABILITIES = {
    "names what it sees": "image->text",
    "names what it hears": "audio->text",
    "draws what is asked": "text->image",
    "plays what is asked": "text->audio",
    "animates what is asked": "text->video",
}
"""Ability -> the task of the evaluation that measures it."""


def main() -> None:
    options = arguments()
    console.set_up_logging()
    prompts = PROMPTS
    if options.prompts:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
        prompts = tuple(line for line in lines if line.strip())

    columns = {}
    for source in dict.fromkeys(filter(None, (options.model, options.compare))):
        columns[heading(source)] = answers(mmllm.load(source), prompts, options.seed)
    intro = headline(options.scores) if options.scores else ""
    page = write_comparison(
        options.folder, f"What {heading(options.model)} answers", columns, intro
    )
    console.echo(f"{page}: {len(prompts)} prompts, {len(columns)} models")


def heading(source: str) -> str:
    """A model's name, and of a run how long it was trained."""
    if source == "mini":
        return "mini as shipped"
    return f"your model after {open_checkpoint(source).step} steps"


def answers(chat: mmllm.Chat, prompts: tuple[str, ...], seed: int) -> list[GalleryEntry]:
    """What a model answers to the prompts, and what it says when it is shown what it made."""
    asked = [[user(prompt)] for prompt in prompts]
    replies = chat.reply_many(asked, seeds=[seed] * len(asked), on_step=console.show_progress)
    shown = [[user(QUESTION, reply.media[0])] for reply in replies if reply.media]
    words = dict.fromkeys(chat.model.renderer.output_keys, "forbid")
    seen = (
        iter(chat.reply_many(shown, seeds=[seed] * len(shown), modalities=words)) if shown else ()
    )
    entries = []
    for (prompt,), reply in zip(asked, replies, strict=True):
        messages = [prompt, reply.message]
        if reply.media:
            messages += [mmllm.assistant(f"Shown it again, it says: {next(seen).text}")]
        entries.append(GalleryEntry(tuple(messages)))
    return entries


def headline(file: Path) -> str:
    """The accuracies of an evaluation in a sentence, each with the baseline's in brackets."""
    report = EvaluationReport.load(file)
    parts = []
    for ability, task in ABILITIES.items():
        own = report.metric(task)
        other = report.baseline.metric(task) if report.baseline else None
        if own is not None:
            compared = f" ({other.value:.0%})" if other else ""
            parts.append(f"{ability}: {own.value:.0%}{compared}")
    brackets = " (in brackets: mini as shipped)" if report.baseline else ""
    return f"Of held-out items{brackets} it {', '.join(parts)}." if parts else ""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--compare", help="another model, in a column of its own")
    parser.add_argument(
        "--scores", type=Path, help="evaluation.json of the model, for the headline"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
