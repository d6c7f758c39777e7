"""`mmllm export`, `mmllm merge` and `mmllm convert nextgpt`: one checkpoint written as another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mmllm import console
from mmllm.cli.options import ModelOption, Trust, check_target, expand_user
from mmllm.errors import ConfigError

ModelAndFolder = Annotated[
    list[str],
    typer.Argument(metavar="MODEL FOLDER", help="A trained model, and where it goes."),
]


def export(
    paths: ModelAndFolder,
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float16",
    transformers: Annotated[
        bool,
        typer.Option("--transformers", help="The language model alone, as plain transformers."),
    ] = False,
    trust: Trust = None,
) -> None:
    """Write a trained model without its training state, ready to be used or given away."""
    from mmllm import checkpoints
    from mmllm.kernels.precision import parse_dtype

    precision = parse_dtype(dtype)
    model, folder = _model_and_folder(paths, model)
    source = checkpoints.open_checkpoint(model)
    check_target(folder, "config.json" if transformers else "manifest.json")
    (checkpoints.export_transformers if transformers else checkpoints.export)(
        source, folder, dtype=precision
    )
    _print_size(folder, source.step)


def merge(
    paths: ModelAndFolder,
    model: ModelOption = None,
    dtype: Annotated[
        str, typer.Option(help="Of the language model: float32, bfloat16 or float16.")
    ] = "bfloat16",
    trust: Trust = None,
) -> None:
    """Write a trained model with its LoRA merged into a language model of its own."""
    from mmllm import checkpoints
    from mmllm.kernels.precision import parse_dtype

    precision = parse_dtype(dtype)
    model, folder = _model_and_folder(paths, model)
    source = checkpoints.open_checkpoint(model)
    check_target(folder, "manifest.json")
    checkpoints.merge(source, folder, dtype=precision)
    _print_size(folder, source.step)


def nextgpt(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of NExT-GPT.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The new checkpoint.")],
    system: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="A system: its LLM, encoders and decoders are used."),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(metavar="WEIGHTS", help="The Vicuna that it was trained on."),
    ] = None,
) -> None:
    """Import a published NExT-GPT checkpoint; list what became of each tensor."""
    from mmllm.convert import nextgpt as importer

    conversion = importer.convert(folder.expanduser(), out.expanduser(), system=system, llm=llm)
    for line in importer.summary(conversion):
        console.echo(line)


def _model_and_folder(paths: Sequence[str], model: str | None) -> tuple[str, Path]:
    """The model and the target folder: MODEL FOLDER, or FOLDER with --model.

    The model has no default: a folder that is named alone may well be the model, which must not be
    written to.
    """
    if len(paths) != (2 if model is None else 1):
        given = " ".join([*paths, *([] if model is None else ["--model", model])])
        raise ConfigError(
            f"expected MODEL FOLDER (or --model MODEL FOLDER), as in `mini exported`, got {given!r}"
        )
    return model or paths[0], expand_user(Path(paths[-1]))


def _print_size(folder: Path, step: int) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console.echo(f"{folder}: step {step}, {size / 1e6:.1f} MB")
