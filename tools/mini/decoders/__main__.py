"""The command line: starts, resumes or ships the training of one decoder."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from tools.mini.decoders.captions import DATA
from tools.mini.decoders.items import read_items
from tools.mini.decoders.shipping import ship
from tools.mini.decoders.table import DECODERS
from tools.mini.decoders.training import Progress, Run, parameters, train

logger = logging.getLogger("mini_decoders")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the decoders that ship with mini.")
    parser.add_argument("decoder", choices=DECODERS)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and samples")
    parser.add_argument("--words", type=Path, help="folder of the sentence encoder (first start)")
    parser.add_argument("--codec", type=Path, help="folder of tools.mini.codec (first start)")
    parser.add_argument(
        "--after", type=Path, help="folder of a run whose transformer to begin with"
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="anneal and stop by then")
    parser.add_argument("--every", type=float, default=6, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--ship", type=Path, metavar="FOLDER", help="write the decoder of a run")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(arguments.threads)
    recipe = DECODERS[arguments.decoder]
    items = read_items(arguments.data, arguments.decoder, recipe.read)
    arguments.run.mkdir(parents=True, exist_ok=True)
    if arguments.resume or arguments.ship:
        run = Run.resume(arguments.run)
    elif arguments.words:
        steps = arguments.steps or recipe.steps
        progress = Progress(arguments.decoder, arguments.seed, steps, arguments.minutes)
        if arguments.decoder != "audio" and not arguments.codec:
            parser.error(f"{arguments.decoder} needs --codec: what tools.mini.codec --out wrote")
        run = Run.start(
            arguments.run, items, arguments.words, arguments.codec, progress, arguments.after
        )
    else:
        parser.error("a first start needs --words, a later one --resume")
    logger.info("%d items, %d concepts", len(items.concepts), len(items.labels))
    logger.info("parameters %s", parameters(run.pipe))
    if arguments.ship:
        ship(run, items, arguments.ship)
    else:
        train(run, items, arguments.every)
