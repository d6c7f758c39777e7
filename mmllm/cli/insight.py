"""`mmllm insight heads` and `mmllm insight steer`: what attention heads do, and replies under a
direction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmllm import console
from mmllm.cli.options import ModelArgument, ModelOption, Trust, check_at_least_one, one_model

Folder = Annotated[Path, typer.Option(metavar="FOLDER", help="Receives the page and the JSON.")]


def heads(
    named: ModelArgument = None,
    model: ModelOption = None,
    examples: Annotated[int, typer.Option(help="Sequences that the scores average over.")] = 10,
    ablate: Annotated[int, typer.Option(help="Heads that are ablated.")] = 5,
    sequences: Annotated[int, typer.Option(help="Sequences whose loss is measured.")] = 20,
    folder: Folder = Path("runs/heads"),
    trust: Trust = None,
) -> None:
    """Score every attention head, and ablate the strongest induction heads."""
    check_at_least_one(examples=examples, ablate=ablate, sequences=sequences)
    chat = _load(one_model(named, model), trust)
    from mmllm.insight.heads import head_table, repeat_losses
    from mmllm.insight.heads_page import write_heads_page

    table = head_table(chat, examples=examples)
    top = table.top(ablate)
    conditions = {
        "all heads": [],
        f"without {' '.join(map(str, top))}": top,
        f"without {ablate} others of these layers": table.controls(top),
    }
    losses = {}
    for name, chosen in conditions.items():
        values = repeat_losses(chat, sequences, heads=chosen)
        half = 1.96 * values.std(correction=0).item() / len(values) ** 0.5
        losses[name] = values.mean().item(), half
        console.echo(f"loss of repeated random tokens, {name}: {losses[name][0]:.2f} ± {half:.2f}")
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{chat.model.config.name}: attention heads"
    write_heads_page(folder / "index.html", title, table, losses)
    _write(folder / "heads.json", {"heads": table.to_json(), "losses": losses})
    console.echo(f"{folder / 'index.html'}")


def steer(
    request: Annotated[str, typer.Argument(help="What is asked for.")],
    towards: Annotated[str, typer.Option(help="A request for what is to come instead.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="As `mmllm chat` takes it.")] = "mini",
    media: Annotated[str, typer.Option(help="What is made: image, audio or video.")] = "image",
    site: Annotated[
        str | None, typer.Option(help="Where; unless given, behind four fifths of the layers.")
    ] = None,
    strength: Annotated[
        list[float] | None, typer.Option(help="Multiples of the difference (repeatable).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the replies.")] = 0,
    folder: Folder = Path("runs/steer"),
    trust: Trust = None,
) -> None:
    """Add the difference of two requests to the states of a reply's signal span."""
    chat = _load(model, trust)
    from mmllm.conversation import Message, user
    from mmllm.gallery import GalleryEntry, write_gallery
    from mmllm.insight.steering import MAX_NEW_TOKENS, difference, late_site
    from mmllm.insight.steering import steer as steered

    site = site or late_site(chat)
    direction = difference(chat, site, [[user(towards)]], [[user(request)]], media=media)
    modalities: Any = {media: "force"}
    entries, rows = [], []
    for value in strength or (0.0, 0.5, 1.0, 1.5):
        with steered(chat, direction, strength=value):
            reply = chat.reply(
                request,
                seed=seed,
                temperature=0.0,
                max_new_tokens=MAX_NEW_TOKENS,
                modalities=modalities,
            )
        (score,) = chat.score(request, [reply.text])  # by the model as it is
        per_token = -score / max(reply.usage.text + 1, 1)
        entries.append(
            GalleryEntry(
                (user(request), Message("assistant", reply.message.parts)),
                f"strength {value:g}; the text costs {per_token:.2f} a token without steering",
            )
        )
        rows.append({"strength": value, "text": reply.text, "loss_of_text": per_token})
        console.echo(f"strength {value:g}: {reply.text!r}, {per_token:.2f} a token")
    page = write_gallery(folder, f"{request} + {towards}", entries, f"Steered at {site}.")
    _write(folder / "steer.json", {"site": site, "replies": rows})
    console.echo(f"{page}")


def _load(model: str, trust: list[str] | None) -> Any:
    import mmllm

    console.note(f"loading {model}")
    return mmllm.load(model, trust=trust or ())


def _write(file: Path, content: Any) -> None:
    from mmllm.utils.files import atomic_write

    atomic_write(file, json.dumps(content, indent=1))
