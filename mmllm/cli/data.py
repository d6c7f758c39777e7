"""`mmllm data check`: a scan of a stage's datasets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mmllm import console
from mmllm.cli.options import Config, check_at_least_one, find_config
from mmllm.cli.train import INTERRUPTED
from mmllm.errors import AssetError, CheckpointError, ConfigError


def check(
    config: Config,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="For example stage.data.pairs.root=FOLDER."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the page goes (default: OUTPUT/data-check)."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows of each dataset on the page.")] = 12,
    limit: Annotated[
        int | None, typer.Option(help="Rows of each dataset at most, drawn at random.")
    ] = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Open media without decoding them.")
    ] = False,
    num_workers: Annotated[int, typer.Option(help="Threads that decode.")] = 4,
) -> None:
    """Find missing, damaged and oversized media, empty captions, placeholders without a medium,
    rows that are not conversations or too long, and duplicates in all datasets of a stage; write a
    page of samples. Exit code 1 if anything is wrong."""
    from mmllm import planning
    from mmllm.config import load_run
    from mmllm.data import check_report, checking
    from mmllm.training.feed import open_sources

    check_at_least_one(samples=samples, limit=limit, num_workers=num_workers)
    run = load_run(find_config(config), overrides or ())
    stage = run.stage
    sources = open_sources(stage.data, "stage.data")
    if stage.validation:
        held_out = open_sources(stage.validation.data, "stage.validation.data")
        sources |= {f"validation.{name}": source for name, source in held_out.items()}
    try:
        renderer = planning.renderer(run.system)
    except (AssetError, CheckpointError, ConfigError) as error:
        console.note(f"lengths of rows are not checked: {error}")
        renderer = None
    report = checking.check(
        sources,
        out or Path(stage.output).expanduser() / "data-check",
        samples=samples,
        limit=limit,
        headers_only=headers_only,
        workers=num_workers,
        progress=sys.stderr.isatty(),
        renderer=renderer,
        max_length=stage.max_length,
    )
    for line in check_report.table(report):
        console.echo(line)
    console.note(f"samples: {report.page}")
    if not report.complete:
        console.note("stopped: the remaining rows were not checked")
        raise typer.Exit(INTERRUPTED)
    if report.problems:
        raise typer.Exit(1)
