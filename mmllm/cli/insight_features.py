"""`mmllm insight features`: a dictionary of a model's features, and the page of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmllm import console
from mmllm.cli.options import Trust, check_at_least_one

_NUM_CHANGES = 12
"""Features of which is shown what the adapters changed."""


def features(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As `mmllm chat` takes it.")
    ] = "mini",
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Dialogues (JSON or JSONL) to run the model over.")
    ] = "mini:data/dialogues.jsonl.gz",
    site: Annotated[
        str | None, typer.Option(help="Where; unless given, behind four fifths of the layers.")
    ] = None,
    kind: Annotated[
        Literal["batch_topk", "topk", "matryoshka", "jumprelu"],
        typer.Option(help="Of the dictionary."),
    ] = "batch_topk",
    width: Annotated[int, typer.Option(help="Features of the dictionary.")] = 4096,
    k: Annotated[int, typer.Option("--k", help="Active features, on average.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 600,
    conversations: Annotated[int | None, typer.Option(help="Conversations, at most.")] = 4000,
    shown: Annotated[int, typer.Option(help="Features on the page.")] = 32,
    baselines: Annotated[
        bool, typer.Option(help="Train and score a random decoder too, which doubles the time.")
    ] = False,
    against: Annotated[
        Literal["base"] | None,
        typer.Option(help="Show what the adapters changed: the same features without them."),
    ] = None,
    folder: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For states, dictionary and page.")
    ] = Path("runs/insight"),
    trust: Trust = None,
) -> None:
    """Train a sparse autoencoder on a model's states and show its features as a page."""
    import mmllm
    from mmllm.insight.dictionary.training import DictionaryConfig
    from mmllm.insight.features.changes import feature_changes
    from mmllm.insight.features.gallery import write_features
    from mmllm.insight.study import DictionaryStudy, read_data

    check_at_least_one(width=width, k=k, steps=steps, conversations=conversations, shown=shown)
    config = DictionaryConfig(kind=kind, width=width, k=k, steps=steps)
    chat = mmllm.load(model, trust=trust or ())
    study = DictionaryStudy(
        chat.model,
        chat.fingerprint,
        read_data(chat.model, data, limit=conversations),
        folder,
        site=site,
        config=config,
        name=model,
    )
    changes = []
    if against:
        base = study.base_activations
        changes = feature_changes(study.dictionary, base, study.activations, _NUM_CHANGES)
    page = write_features(
        study, folder / "features.html", num=shown, with_frozen=baselines, changes=changes
    )
    console.echo(study.summary(with_frozen=baselines))
    if changes:
        console.echo("without adapters -> with them:")
        console.echo("\n".join(map(str, changes)))
    console.echo(f"{page}")
