"""`mmllm train`: one stage, in this process or in those that accelerate started."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mmllm.cli.options import Config, Trust, find_config

INTERRUPTED = 130
"""Exit code of a command that was stopped before it was done."""


def train(
    config: Config,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="For example stage.steps=500."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="One step of everything; nothing is kept.")
    ] = False,
    trust: Trust = None,
) -> None:
    """Train one stage (`accelerate launch … train/train.py`: in several processes)."""
    from mmllm.config import load_run

    run = load_run(find_config(config), overrides or ())
    agree_on_cpu()
    from mmllm.checkpoints import latest
    from mmllm.training import trainer

    if dry_run:
        trainer.dry_run(run)
        return
    output = trainer.train(run, resume=resume)
    reached = latest(output)
    if reached is None or reached.step < run.stage.steps:
        raise typer.Exit(INTERRUPTED)


def agree_on_cpu() -> None:
    """Set ACCELERATE_USE_CPU for several processes without a GPU.

    Otherwise accelerate does not join them: each would train alone and overwrite the others'
    results.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None or accelerator.type == "mps":
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
