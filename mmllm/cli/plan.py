"""`mmllm plan`: what a stage or a system costs, before anything is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmllm import console
from mmllm.cli.options import ModelOption, Trust, find_config, is_trained, one_model
from mmllm.errors import ConfigError


def plan(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]…",
            help="A stage's or system's YAML, their folder, a checkpoint or run folder, or a name "
            "(mini); and what to change in it, for example stage.batch_size=64.",
        ),
    ] = None,
    model: ModelOption = None,
    num_processes: Annotated[int, typer.Option(help="How many share the stage's batch.")] = 1,
    flops: Annotated[
        float | None, typer.Option(metavar="RATE", help="Operations a second that a device does.")
    ] = None,
    items: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Items of each dataset whose file is not here yet, for the size of the cache; "
            "without it, as many as the steps draw.",
        ),
    ] = None,
    trust: Trust = None,
) -> None:
    """Show parameters, licences, memory, disk and time; needs no weights, GPU or network."""
    from mmllm import planning

    if flops is not None and flops <= 0:
        raise ConfigError(f"--flops: expected more than 0, got {flops:g}")
    words = words or []
    overrides = [word for word in words if "=" in word]
    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise ConfigError(f"expected one CONFIG and KEY=VALUE, got {', '.join(configs)}")
    config = _config_of(one_model(configs[0] if configs else None, model))
    result = planning.plan(config, overrides, processes=num_processes, num_items=items)
    for line in planning.render(result, flops=flops):
        console.echo(line)


def _config_of(name: str) -> Path:
    """The config that a name stands for: a YAML, a folder of them, or that of a checkpoint, of a
    run's newest checkpoint or of a model by name."""
    path = find_config(name)
    if path.is_file() or (path.is_dir() and any(path.glob("*.yaml")) and not is_trained(path)):
        return path
    from mmllm.checkpoints import MODELS, open_checkpoint

    if path.is_dir() or "." not in path.name or name in MODELS:
        return open_checkpoint(name).folder / "config.yaml"
    return path
