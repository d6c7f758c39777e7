"""`mmllm cache`: the features of a stage's frozen parts, computed once and kept in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mmllm import console
from mmllm.cli.options import find_config
from mmllm.cli.train import agree_on_cpu
from mmllm.errors import ConfigError


def cache(
    target: Annotated[
        str, typer.Argument(metavar="CONFIG|info|verify|prune", help="What to cache, or to do.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…|FOLDER", help="For example stage.cache=FOLDER."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="FINGERPRINT", help="prune: keep these only (repeatable)."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Share the work out over a Ray cluster: local, auto or its HOST:PORT.",
        ),
    ] = None,
) -> None:
    """Run a stage's frozen parts over its data once and keep their outputs in a folder; list,
    verify or prune such a folder."""
    if target in ("info", "verify", "prune"):
        if len(arguments or ()) != 1:
            given = arguments or "none"
            raise ConfigError(f"mmllm cache {target}: expected one FOLDER, got {given}")
        folder = Path((arguments or [""])[0]).expanduser()
    else:
        folder = _fill(target, arguments or (), ray)
    if target == "prune":
        _prune(folder, keep)
    if target == "verify":
        _verify(folder)
    _list(folder)


def _fill(config: str, overrides: Sequence[str], ray: str | None) -> Path:
    """Compute what is missing; returns the folder."""
    from mmllm.config import load_run

    run = load_run(find_config(config), overrides)
    agree_on_cpu()
    if ray is None:
        from mmllm.training.precompute import fill_cache

        return fill_cache(run).folder
    from mmllm.training.cluster import fill_cache_by_ray

    return fill_cache_by_ray(run, ray).folder


def _prune(folder: Path, keep: Sequence[str] | None) -> None:
    from mmllm.features import maintenance

    freed = maintenance.prune(folder, set(keep) if keep else None)
    console.echo(f"{folder}: {freed / 1e6:.1f} MB freed")


def _verify(folder: Path) -> None:
    """Print damaged files; exit code 1 if there are any."""
    from mmllm.features import maintenance

    damaged, unverified = maintenance.verify(folder)
    for path, reason in damaged:
        console.echo(f"{path}: {reason}")
    if unverified:
        console.note(
            f"{len(unverified)} shard(s) of an earlier version have no checksums: what is read "
            "from them cannot be compared; delete the folder and fill it again to have them"
        )
    if damaged:
        console.note(
            "damaged; `mmllm cache prune` deletes these files, and `mmllm cache CONFIG` then "
            "computes again what was in them"
        )
        raise typer.Exit(1)


def _list(folder: Path) -> None:
    from mmllm.features import maintenance

    for entry in maintenance.list_namespaces(folder):
        console.echo(
            f"{entry.kind:10} {entry.part:16} {entry.fingerprint}  {entry.items:7,} items "
            f"({entry.duplicates} twice)  {entry.shards} shards  {entry.bytes / 1e6:.1f} MB"
        )
