"""`mmllm evaluate`: a model's accuracy on held-out items."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mmllm.cli.options import ModelArgument, ModelOption, Trust, check_at_least_one, one_model


def evaluate(
    named: ModelArgument = None,
    model: ModelOption = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="A second model, or the JSON of a report, shown in a second column."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Only this task (repeatable).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the whole report to this file.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table's metrics alone as JSON.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items per task at most, for a quick look.")
    ] = None,
    gallery: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write a page of held-out items.")
    ] = None,
    short_run: Annotated[
        bool,
        typer.Option("--short-run", help="After minutes of training: fewer items, own thresholds."),
    ] = False,
    whole_table: Annotated[bool, typer.Option("--all", help="Print every metric.")] = False,
    trust: Trust = None,
) -> None:
    """Measure a model on held-out items and print how well it does each thing."""
    from mmllm import evaluation

    check_at_least_one(limit=limit)
    report = evaluation.evaluate(
        one_model(named, model),
        tasks=tasks,
        json_path=json_file,
        baseline=baseline,
        limit=limit,
        gallery=gallery,
        short_run=short_run,
        whole_table=whole_table,
    )
    if summary:
        replace(report, items=(), baseline=None).save(summary)
