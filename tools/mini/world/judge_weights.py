"""What a training of a judge leaves behind: its weights in half precision, scores and a card."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from tools.mini.world.run import Run

logger = logging.getLogger("judge")

CARD = """# The judge `{name}`

{what} It is for measuring alone
(`mmllm/evaluation/{name}_judge.py`): no part of `mini` uses it or its features.

| | |
|---|---|
| made by | `{command}`: {steps} steps in {minutes:.0f} minutes, seed {seed} |
| weights | {parameters:,} parameters, float16 |
| trained on | {source} |
| licence | that of this project |

Right on renderings that training never had (`{name}.json`):

{table}
"""


def ship(
    run: Run,
    model: nn.Module,
    name: str,
    measure: Callable[[Path], Mapping[str, Any]],
    *,
    what: str,
    source: str,
    command: str,
) -> None:
    """Write `NAME.safetensors` (averaged weights), `NAME.json` (scores) and the card `NAME.md`.

    Args:
        run: The training.
        model: Of its shape; gets the averaged weights.
        name: Of the judge.
        measure: Takes the file of weights; its scores by what they are of.
        what: A sentence for the card.
        source: What the training has seen, for the card.
        command: How it is started, for the card.
    """
    run.load_averages(model)
    file = run.folder / f"{name}.safetensors"
    save_file({key: w.half().contiguous() for key, w in model.state_dict().items()}, file)
    scores = measure(file)
    (run.folder / f"{name}.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    rows = [f"| {key} | {value:.3f} |" for key, value in scores.items()]
    card = CARD.format(
        name=name,
        what=what,
        source=source,
        command=command,
        steps=run.progress.step,
        minutes=run.progress.seconds / 60,
        seed=run.progress.seed,
        parameters=sum(weight.numel() for weight in model.parameters()),
        table="\n".join(["| what | right |", "|---|---|", *rows]),
    )
    (run.folder / f"{name}.md").write_text(card, encoding="utf-8")
    logger.info("%s: %d steps, %s", name, run.progress.step, scores)
