"""What the page says about its model: what it is made of, what it knows, what it cannot do."""

from __future__ import annotations

from pathlib import Path

from mmllm.inference.chat import Chat


def about(chat: Chat, card: str) -> str:
    """What the model is made of, and its card."""
    from mmllm.mini.assets import ASSETS

    config = chat.model.config
    rows = [("Language model", "llm", config.llm.weights)]
    for kind, parts in (("Encoder", config.encoders), ("Decoder", config.decoders)):
        rows += [(kind, key, getattr(part, "weights", "")) for key, part in parts.items()]
    lines = [
        f"# {config.name}",
        "What it makes is made by a machine: it may be wrong, and every file says inside that a "
        "model made it. Conversations stay on this computer and are deleted when they have not "
        "been used for a while.",
    ]
    for kind, key, weights in rows:
        asset = ASSETS.get(str(weights).removeprefix("mini:"))
        if Path(str(weights)).is_absolute():  # where it lies concerns nobody
            weights = Path(str(weights)).name
        licence = f" ({asset.licence}; {asset.credit})" if asset else ""
        lines.append(f"- **{kind}** {key}: {weights}{licence}")
    return "\n\n".join([*lines, card])
