"""`mmllm swap`: another decoder in a trained system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from mmllm import console
from mmllm.cli.options import (
    Device,
    Trust,
    check_at_least_one,
    check_target,
    expand_user,
    find_config,
)
from mmllm.errors import ConfigError, quoted

if TYPE_CHECKING:
    from mmllm.training.swapping import ConditionQuality


def swap(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A checkpoint or run folder, or a name (mini).")
    ],
    decoders: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=DECODER…",
            help="A pipeline's folder, or its entry: 'image={type: sana, weights: ID}'.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the new checkpoint goes.")
    ] = Path("runs/swapped"),
    config: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="A stage whose data are used (else RUN's own)."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of alignment with the captions.")] = 1500,
    denoise_steps: Annotated[int, typer.Option(help="Of the denoising loss, after those.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Media of a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="The peak of the schedule.")] = 1e-3,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Keep nothing of the former output projection.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what is held out, the order and the noise.")] = 0,
    device: Device = None,
    trust: Trust = None,
) -> None:
    """Put another decoder into a trained system; only its output projection is fitted."""
    check_at_least_one(steps=steps, batch_size=batch_size)
    out = expand_user(out)
    check_target(out, "manifest.json")
    from mmllm import checkpoints
    from mmllm.config import load_run
    from mmllm.decoders.detection import decoder_config
    from mmllm.training.swapping import SwapOptions, swap_decoders

    new = {}
    for entry in decoders:
        key, equals, value = entry.partition("=")
        if not equals or not value:
            raise ConfigError(
                f"expected KEY=DECODER, such as image=FOLDER, got {quoted(entry)}; the keys are "
                "those of `decoders` in the system"
            )
        tree = yaml.safe_load(value) if value.lstrip().startswith("{") else value
        new[key] = decoder_config(tree, key)
    swaps = swap_decoders(
        checkpoints.open_checkpoint(source),
        new,
        out,
        stage=load_run(find_config(config)).stage if config else None,
        options=SwapOptions(
            steps=steps,
            denoise_steps=denoise_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            keep=not fresh,
            seed=seed,
        ),
        device=device or "cpu",
    )
    for each in swaps:
        console.echo(f"decoders.{each.key}: {each.before} -> {each.after}")
        console.echo(
            f"  fitted to {each.num_media} media in {each.seconds:.0f} s; on {each.num_held_out} "
            "held-out ones:"
        )
        console.echo(f"  {'former decoder':<22} {_line(each.former)}")
        console.echo(f"  {'new one, not fitted':<22} {_line(each.unfitted)}")
        console.echo(f"  {'new one':<22} {_line(each.fitted)}")
    console.echo(f"Ask it: mmllm chat --model {out}")


def _line(quality: ConditionQuality) -> str:
    """What one row of the table says."""
    line = f"explains {quality.explained:.2f} of what the decoder's own captions say"
    if quality.share is None:
        return line
    return (
        f"{line}; denoising loss {quality.projected:.4f}, under the caption {quality.own:.4f}, "
        f"under none {quality.empty:.4f}: {quality.share:.2f} of what a caption takes off"
    )
