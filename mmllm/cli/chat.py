"""`mmllm chat`: one reply, or a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmllm import console
from mmllm.cli.options import (
    Device,
    DType,
    Memory,
    Trust,
    check_at_least_one,
    expand_user,
    is_trained,
)
from mmllm.errors import ConfigError
from mmllm.utils.hints import nearest

if TYPE_CHECKING:
    from mmllm.cli.terminal_chat import TerminalOptions


def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="What to say (a conversation begins without it), to which model (mini).",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A name (mini), a checkpoint or run folder, or a YAML (untrained)."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "--picture", metavar="FILE", help="A picture (repeatable)."),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option("--audio", "--sound", metavar="FILE", help="A sound to play (repeatable)."),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", "--clip", metavar="FILE", help="A clip to show (repeatable)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File for the first medium that fits, or a folder (default: mmllm-chat).",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same reply.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="The reply has it: picture, sound or clip (repeatable)."),
    ] = None,
    forbid: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="The reply does not have it."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the decoders.")] = None,
    no_preview: Annotated[
        bool, typer.Option("--no-preview", help="Show no pictures in the terminal.")
    ] = False,
    memory: Memory = False,
    device: Device = None,
    dtype: DType = None,
    trust: Trust = None,
) -> None:
    """Talk to a model: one reply to PROMPT, or in turns without it."""
    from mmllm.cli.terminal_chat import TerminalChat, check_out
    from mmllm.conversation import MEDIA

    model, prompt = model_and_prompt(words or [], model)
    options = _reply_options(force or [], forbid or [], seed, steps)
    files = {"image": image or [], "audio": audio or [], "video": video or []}
    media = [MEDIA[key](source=expand_user(path)) for key in files for path in files[key]]
    for medium in media:
        medium.decoded()  # a bad file is reported before the model is loaded
    out = out and expand_user(out)
    check_out(out)

    import mmllm

    console.note(f"loading {model}")
    loaded = mmllm.load(model, device=device, dtype=dtype, prefixes=1, memory=memory or None)
    terminal_chat = TerminalChat(loaded, options, out, previews=not no_preview)
    if prompt is None and not media:
        terminal_chat.run()
        return
    reply = terminal_chat.turn(prompt or "", media)
    if out is not None and not reply.media:
        console.note(
            f"nothing was written to {out}: the reply is text only; --force picture, sound or clip "
            "asks for a medium"
        )
        raise typer.Exit(1)


def model_and_prompt(words: Sequence[str], model: str | None) -> tuple[str, str | None]:
    """The model and the prompt (None: none) that the words of a command line name.

    The first word is the model if it can be one and --model names none; the rest is the prompt.
    """
    if model is None and words:
        first = words[0]
        path = expand_user(Path(first))
        known = first == "mini" or (_exists(path) and (is_trained(path) or _is_yaml(path)))
        if known or (len(words) > 1 and _is_misspelt_model(first)):
            model, words = first, words[1:]
    return model or "mini", " ".join(words) if words else None


def _is_misspelt_model(name: str) -> bool:
    return nearest(name, ["mini"], cutoff=0.85) is not None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a prompt may be longer than the name of a file can be
        return False


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _reply_options(
    force: Sequence[str], forbid: Sequence[str], seed: int | None, steps: int | None
) -> TerminalOptions:
    from mmllm.cli.terminal_chat import TerminalOptions, check_modality

    force, forbid = ([check_modality(name) for name in names] for names in (force, forbid))
    both = set(force) & set(forbid)
    if both:
        raise ConfigError(f"--force and --forbid both name {', '.join(sorted(both))}")
    check_at_least_one(steps=steps)
    modalities: dict[str, Literal["auto", "force", "forbid"]] = dict.fromkeys(force, "force")
    return TerminalOptions({**modalities, **dict.fromkeys(forbid, "forbid")}, seed, steps)
