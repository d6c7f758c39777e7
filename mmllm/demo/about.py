"""The page's description of its model: components, what it knows, what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmllm.demo.messages import MODALITY_NAMES
from mmllm.inference.chat import Chat
from mmllm.mini.concepts import known_concepts

_KNOWS = """## What it knows

It draws, names and animates {num} everyday things, asked for in plain English: one to four in a
picture, most of them in any of ten colours, in numbers up to four, and in places. It changes what
it drew, plays sounds one after another or together, and answers questions about pictures.

<details><summary>All things that it draws, names and animates</summary>

{image}

</details>

<details><summary>Colours and motions</summary>

{colour}; {motion}

</details>

<details><summary>Sounds that it plays and hears</summary>

{audio}

</details>"""
_CANNOT = """## What it cannot do

Draw what is not on the lists (it is trained to say so, and to offer the nearest thing), count
beyond four, read text in pictures, speak or write down speech, or speak another language than
English. Pictures of three and more things often go wrong: check what it makes."""


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


def welcome(chat: Chat) -> str:
    """Return the Markdown of the start page: the model's name and what it can do."""
    renderer, name = chat.model.renderer, chat.model.config.name
    takes, makes = (_listed([*keys]) for keys in (renderer.input_keys, renderer.output_keys))
    can = [f"understands and makes {takes}"]
    if takes != makes:
        can = [
            f"{verb} {media}" for verb, media in (("understands", takes), ("makes", makes)) if media
        ]
    about = [f"It {', and '.join(['talks', *can])}." if takes or makes else "It talks."]
    if is_mini(chat):
        about.append("It is small and knows everyday things only: About lists them.")
    return f"# {name}\n\n{' '.join(about)}"


def _listed(modalities: Sequence[str]) -> str:
    """Return the page's names of media: "pictures, sounds and clips"."""
    names = [f"{MODALITY_NAMES[modality]}s" for modality in modalities]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def is_mini(chat: Chat) -> bool:
    """Return whether a model was trained on mini's data, whose concepts have names."""
    return chat.model.config.name == "mini"


def _known() -> dict[str, str]:
    """The fields of `_KNOWS`."""
    known = known_concepts()
    names = {kind: ", ".join(entries) for kind, entries in known.items()}
    return {"num": str(len(known["image"])), **names}
