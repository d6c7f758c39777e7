"""Teaching `mini` 40 images of 20 things that it has never seen: time, names, and what it keeps.

python benchmarks/teach.py
python benchmarks/teach.py --model runs/named

The things are those of demos/unseen.py, two images each, taught in two styles and asked about in
two others. What it knew is asked about in a style that training never has. Counted is what the
projection reads (of `type: words` its word, of `type: ctc` what it names or spells), and what the
language model replies, both judged by name.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import mmllm
from demos.unseen import ASK, write_images
from mmllm import Image, console, user
from mmllm.data.sources import resolve
from mmllm.evaluation.labels import LabelMatcher
from mmllm.features.cache import FeatureCache
from mmllm.projections.ctc import CTCProjection
from mmllm.training.teaching import teach

DATA = resolve("mini:data/concepts.json").parent
UNSEEN = "twemoji"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini", help="a checkpoint, or a known name")
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
        lessons, media = teach(own / "teach", taught, model=arguments.model)
        seconds = time.monotonic() - began
        console.echo(f"taught {len(media.items)} images in {seconds:.1f} s: {lessons}")
        for name in (arguments.model, taught):
            chat = mmllm.load(name, dtype="float32")
            for what, concepts, styles in (("new", new, ASK), ("known", known, (UNSEEN,))):
                asked = [(entry["id"], style) for style in styles for entry in concepts]
                images = [Image(DATA / f"pictures/{style}/{thing}.webp") for thing, style in asked]
                readings = read(chat, images)
                replies = [
                    chat.reply([user("What is this?", image)], seed=0).text for image in images
                ]
                shares = [
                    sum(
                        labels.matches_only(text, thing)
                        for text, (thing, _) in zip(texts, asked, strict=True)
                    )
                    / len(asked)
                    for texts in (readings, replies)
                ]
                console.echo(
                    f"{Path(name).name}: {len(asked)} images of {what} things: read right "
                    f"{shares[0]:.3f}, named right in the reply {shares[1]:.3f}"
                )


@torch.inference_mode()
def read(chat: mmllm.Chat, images: Sequence[Image]) -> list[str]:
    """What the projection reads each image as, in the language model's tokens."""
    model = chat.model
    table = F.normalize(model.llm.embedding.weight.float(), dim=-1)
    projection: Any = model.input_projections["image"]
    if isinstance(projection, CTCProjection):
        projection.find_ids(model.llm.embedding.weight)
    found = []
    for start in range(0, len(images), 32):
        media = FeatureCache(model).input_media("image", images[start : start + 32])
        features = media["features"], media["feature_mask"]
        if isinstance(projection, CTCProjection):
            found += projection.spell(*features)
        else:
            words = projection.table[projection.scores(*features).argmax(-1)] * projection.gain
            found += (F.normalize(words, dim=-1) @ table.T).argmax(-1).tolist()
    return [model.llm.tokenizer.decode([token for token in ids if token >= 0]) for ids in found]


if __name__ == "__main__":
    main()
