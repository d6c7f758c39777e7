"""Teaching `mini` 40 images of 20 things that it has never seen: time, names, and what it keeps.

python benchmarks/teach.py

The things are those of demos/unseen.py, two images each, taught in two styles and asked about in
two others. What it knew is asked about in a style that training never has. Answers are the language
model's words, judged by name.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import mmllm
from demos.unseen import ASK, write_images
from mmllm import Image, console, user
from mmllm.data.sources import resolve
from mmllm.evaluation.labels import LabelMatcher
from mmllm.training.teaching import teach

DATA = resolve("mini:data/concepts.json").parent
UNSEEN = "twemoji"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--known", type=int, default=100, help="known things that are asked about")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    concepts = json.loads((DATA / "concepts.json").read_text(encoding="utf-8"))
    new = [entry for entry in concepts if entry["split"] != "train"]
    known = [entry for entry in concepts if entry["split"] == "train"][:: 351 // arguments.known]
    labels = LabelMatcher(concepts)
    with tempfile.TemporaryDirectory() as folder:
        own, taught = Path(folder, "own"), Path(folder, "taught")
        write_images(own)
        began = time.monotonic()
        lessons, media = teach(own / "teach", taught)
        seconds = time.monotonic() - began
        console.echo(f"taught {len(media.items)} images in {seconds:.1f} s: {lessons}")
        for name in ("mini", taught):
            chat = mmllm.load(name, dtype="float32")
            right = share(chat, new, ASK, labels)
            kept = share(chat, known, (UNSEEN,), labels)
            console.echo(f"{Path(name).name}: new things {right:.3f}, known things {kept:.3f}")


def share(
    chat: mmllm.Chat, concepts: Sequence[dict], styles: Sequence[str], labels: LabelMatcher
) -> float:
    """The share of images whose thing, and no other, the reply names."""
    right = [
        labels.matches_only(
            chat.reply(
                [user("What is this?", Image(DATA / f"pictures/{style}/{entry['id']}.webp"))],
                seed=0,
            ).text,
            entry["id"],
        )
        for style in styles
        for entry in concepts
    ]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
