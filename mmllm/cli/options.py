"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmllm.errors import ConfigError


def _trust(names: list[str] | None) -> list[str] | None:
    from mmllm.config import trust

    trust(names or ())
    return names


Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="NAME",
        callback=_trust,
        help="A module of yours, or a template's file, that the checkpoint may use (repeatable).",
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A name (mini), a checkpoint or run folder, or a YAML (untrained)."
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The same, as an option.")
]
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML of one stage.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps.")]
DType = Annotated[str | None, typer.Option(help="float32 or bfloat16.")]

Memory = Annotated[
    bool,
    typer.Option("--memory", help="Conversations longer than the model's context (llm.memory)."),
]


def one_model(argument: str | None, option: str | None) -> str:
    """The model that was named as an argument or as --model; `mini` unless given."""
    if argument is not None and option is not None and argument != option:
        raise ConfigError(f"two models: {argument!r} and --model {option!r}; give one")
    return argument or option or "mini"


def find_config(name: str) -> Path:
    """The path of a config; `configs/…` is also found in the installed package."""
    path = expand_user(Path(name))
    packaged = Path(__file__).parents[1] / name
    if not path.exists() and name.startswith("configs/") and packaged.exists():
        return packaged
    return path


def is_trained(path: Path) -> bool:
    """Whether a folder is a checkpoint or a run."""
    return (path / "manifest.json").is_file() or (path / "checkpoints").is_dir()


def expand_user(path: Path) -> Path:
    """The path with a `~` expanded that the shell left as it is, as in --out=~/apple.png."""
    try:
        return path.expanduser()
    except RuntimeError:  # no user of that name
        return path


def check_target(folder: Path, marker: str) -> None:
    """Raise ConfigError unless `folder` is new, empty or an earlier export, which has `marker`."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names - {"README.md"} and marker not in names:
        raise ConfigError(f"{folder}: holds other files; name a new or an exported folder")


def check_at_least_one(**values: int | None) -> None:
    """Raise ConfigError for a value below 1; keywords are options, None is not given."""
    for name, value in values.items():
        if value is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: expected at least 1, got {value}")
