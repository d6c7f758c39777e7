"""The page's description of its model: components, what it knows, what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmllm.inference.chat import Chat
from mmllm.mini import locate

_KNOWS = """## What it knows

It names and draws {num} everyday things, plays the sounds of some and animates others, asked for
in plain English, one thing at a time.

<details><summary>All things that it names and draws</summary>

{pictures}

</details>

<details><summary>Things whose sound it plays and hears</summary>

{sounds}

</details>

<details><summary>Things that it animates</summary>

{clips}

</details>"""
_CANNOT = """## What it cannot do

Count, place things next to one another, change a colour on request, draw what is not on the lists,
read text in pictures, speak or write down speech, and remember a long conversation. It does not say
so when it fails: check what it makes."""


def about(chat: Chat, card: str) -> str:
    """Describe the components of the model, followed by its card."""
    from mmllm.mini.assets import ASSETS

    config = chat.model.config
    rows = [("Language model", "llm", config.llm.weights)]
    for kind, parts in (("Encoder", config.encoders), ("Decoder", config.decoders)):
        rows += [(kind, key, getattr(part, "weights", "")) for key, part in parts.items()]
    lines = [
        f"## {config.name}",
        "What it makes is made by a machine: it may be wrong, and every file says inside that a "
        "model made it. Conversations stay on this computer and are deleted when they have not "
        "been used for a while.",
    ]
    for kind, key, weights in rows:
        asset = ASSETS.get(str(weights).removeprefix("mini:"))
        if Path(str(weights)).is_absolute():  # no local paths on the page
            weights = Path(str(weights)).name
        licence = f" ({asset.licence}; {asset.credit})" if asset else ""
        lines.append(f"- **{kind}** {key}: {weights or 'of frames, by the image encoder'}{licence}")
    knows = [_KNOWS.format(**_known()), _CANNOT] if is_mini(chat) else []
    return "\n\n".join([*lines[:2], *knows, "## Its parts", *lines[2:], card])


def is_mini(chat: Chat) -> bool:
    """Return whether a model was trained on mini's data, whose concepts have names."""
    return chat.model.config.name == "mini"


def _known() -> dict[str, str]:
    """List the concepts of mini's data as text: all, those with audio, those with video."""
    concepts = json.loads((locate("data") / "concepts.json").read_text(encoding="utf-8"))

    def names(kept: Callable[[dict[str, Any]], Any]) -> str:
        return ", ".join(sorted(concept["label"] for concept in concepts if kept(concept)))

    return {
        "num": str(len(concepts)),
        "pictures": names(lambda concept: True),
        "sounds": names(lambda concept: concept["sound"]),
        "clips": names(lambda concept: concept["clip"]),
    }
