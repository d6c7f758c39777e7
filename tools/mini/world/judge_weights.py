"""What a training of a judge leaves behind: its weights in few bits, scores and a card."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.mini.world.run import Run

logger = logging.getLogger("judge")

CARD = """# The judge `{name}`

{what} It is for measuring alone
(`mmllm/evaluation/{name}_judge.py`): no part of `mini` uses it or its features.

| | |
|---|---|
| made by | `{command}`: {steps} steps in {minutes:.0f} minutes, seed {seed} |
| weights | {parameters:,} parameters, float16; 3 x 3 convolutions float8_e4m3fn |
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
    save_file({key: _small(weight) for key, weight in model.state_dict().items()}, file)
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


def _small(weight: Tensor) -> Tensor:
    """In float16; the 3 x 3 convolutions, most of the numbers, in float8. With all weights in
    float8 the judge of scenes finds 0.977 of the things, so and in float16 alone 0.980."""
    is_convolution = weight.ndim == 4 and weight.shape[-1] == 3
    return weight.to(torch.float8_e4m3fn if is_convolution else torch.float16).contiguous()
