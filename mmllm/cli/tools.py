"""Small commands: `mmllm provenance`, `mmllm assets`, `mmllm concepts`, `mmllm version`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmllm import console
from mmllm.errors import ConfigError


def provenance(
    file: Annotated[Path, typer.Argument(help="An image, audio or video file.")],
) -> None:
    """Print which model made a file; exit code 1 if the file does not hold that."""
    from mmllm import media

    record = media.read_provenance(file)
    if record is None:
        console.note(f"{file}: no mark of mmllm")
        raise typer.Exit(1)
    console.echo(json.dumps(record, indent=1, ensure_ascii=False))


def assets(
    action: Annotated[Literal["list", "fetch"], typer.Argument()] = "list",
    names: Annotated[list[str] | None, typer.Argument(help="All unless named.")] = None,
) -> None:
    """List the weights that are fetched once, or fetch them."""
    from mmllm.mini import assets as store

    for name in names or store.ASSETS:
        if action == "fetch":
            console.echo(f"{name}: {store.fetch(name)}")
        elif name in store.ASSETS:
            asset = store.ASSETS[name]
            package = f"{asset.package} {asset.version}"
            console.echo(
                f"{name:22} {asset.size / 1e6:4.0f} MB  {asset.licence:11} {package}\n"
                f"{'':22} {asset.credit}"
            )
        else:
            raise ConfigError(f"unknown asset {name!r}; known are {', '.join(store.ASSETS)}")
    console.note(f"kept in {store.cache_folder()}")


def concepts(
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with their pictures instead.")
    ] = None,
) -> None:
    """List what `mini` knows: the things it draws, their colours and motions, and its sounds."""
    from mmllm.mini.concepts import known_concepts

    if page:
        from mmllm.demo.known import write_page

        console.echo(str(write_page(page)))
        return
    verbs = {
        **{"image": "draws, names and animates", "colour": "colours"},
        **{"motion": "motions", "audio": "plays and hears"},
    }
    for kind, names in known_concepts().items():
        console.echo(f"{verbs[kind]} ({len(names)}): {', '.join(names)}\n")


def version() -> None:
    """Print the versions of mmllm and of the libraries that it builds on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    import mmllm

    console.echo(f"mmllm {mmllm.__version__}")
    console.echo(f"Python {sys.version.split()[0]}")
    for name in ("torch", "transformers", "diffusers", "peft", "accelerate"):
        try:
            console.echo(f"{name} {installed(name)}")
        except PackageNotFoundError:
            console.echo(f"{name} is not installed")
