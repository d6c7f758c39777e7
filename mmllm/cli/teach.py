"""`mmllm teach`: the names of one's own media."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmllm import console
from mmllm.cli.options import ModelOption, Trust, check_at_least_one, check_target, expand_user


def teach(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|TABLE",
            help="Subfolders named by what their files show, or a CSV of files and labels.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the taught model goes.")
    ] = Path("runs/taught"),
    model: ModelOption = None,
    rehearse: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|TABLE", help="Media it already names and is to keep (mini has its own)."
        ),
    ] = None,
    cache: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Keeps what encoders read, for the next time."),
    ] = Path("runs/mini/cache"),
    steps: Annotated[
        int | None, typer.Option(help="Of the classifier that chooses its words.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order and of dropout.")] = 0,
    trust: Trust = None,
) -> None:
    """Teach a model to name your own images, sounds or clips, in about a minute."""
    if steps is not None:
        check_at_least_one(steps=steps)
    out = expand_user(out)
    check_target(out, "manifest.json")
    from mmllm.training.teaching import teach
    from mmllm.utils.quiet import quiet_libraries

    with quiet_libraries():
        lessons, media = teach(
            source,
            out,
            model=model or "mini",
            rehearse=rehearse,
            steps=steps,
            seed=seed,
            cache=expand_user(cache),
        )
    for line in media.skipped:
        console.note(f"skipped: {line}")
    for lesson in lessons:
        names = f"{len(lesson.new)} new" + (f", {len(lesson.known)} known" if lesson.known else "")
        console.echo(
            f"{lesson.encoder}: {lesson.num_media} files of {len(lesson.new) + len(lesson.known)} "
            f"things ({names}); {lesson.accuracy:.0%} of them named right"
        )
        if lesson.kept is not None:
            console.echo(f"{lesson.encoder}: {lesson.kept:.1%} of what it knew is named as before")
    console.echo(f'Ask it: mmllm chat --model {out} "What is this?" --image FILE')
