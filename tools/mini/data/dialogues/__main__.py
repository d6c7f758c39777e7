"""Builds all files in memory, checks them, and writes them."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from pathlib import Path

from mmllm.data.sources import write_text
from tools.mini.data.dialogues.checks import check, heldout_names
from tools.mini.data.dialogues.heldout import tests
from tools.mini.data.dialogues.pairs import pairs
from tools.mini.data.dialogues.plain_chat import fit, plain_prompts, replies
from tools.mini.data.dialogues.tasks import dialogues
from tools.mini.data.dialogues.texts import write_texts
from tools.mini.data.dialogues.world import DATA, ROOT, Row, World

log = logging.getLogger("dialogues")


def main() -> None:
    """Load, write every file in memory, check, save."""
    parser = argparse.ArgumentParser(description="Writes the conversations of mini's data.")
    parser.add_argument(
        "--replies",
        type=Path,
        default=ROOT / "runs" / "mini_data" / "replies.json",
        help="where the language model's replies are kept",
    )
    parser.add_argument("--texts", type=Path, help="folder with the packages of data/text/")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.texts:
        write_texts(args.texts)
        return

    world = World.load()
    prompts = json.loads((DATA / "prompts.json").read_text("utf-8"))
    plain_texts = plain_prompts(world, prompts)
    known = replies([text for texts in plain_texts.values() for text in texts], args.replies)
    unseen = heldout_names(world)
    plain = {
        kind: [(t, known[t]) for t in plain_texts[kind] if fit(known[t], unseen)]
        for kind in plain_texts
    }
    files = {
        "pairs.jsonl.gz": pairs(world),
        "dialogues.jsonl.gz": dialogues(world, prompts, "train", plain),
        "validation.jsonl.gz": dialogues(world, prompts, "validation", plain),
        "tests.jsonl.gz": tests(world, prompts),
    }
    check(world, prompts, files)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        write_text(DATA / name, "".join(line + "\n" for line in lines))
        report(name, rows)


def report(name: str, rows: list[Row]) -> None:
    counts = Counter(row.get("row") or row.get("task") or row["modality"] for row in rows)
    size = (DATA / name).stat().st_size
    log.info("%s: %d rows, %d bytes: %s", name, len(rows), size, dict(counts))
