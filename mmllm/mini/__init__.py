"""`mini`: a small real any-to-any system that needs no hub and no GPU.

Its decoders, data and finished checkpoint are shipped in this folder; the language model and the
encoders are fetched once by package name (mmllm.mini.assets). Importing this module registers
the codecs that the shipped diffusers pipelines use.
"""

from __future__ import annotations

from pathlib import Path

from mmllm.errors import AssetError

FOLDER = Path(__file__).parent
MADE_HERE = {
    "decoders": "train it with `python -m tools.mini.world.decoders` of the repository",
    "checkpoint": "train it with `make mini`",
}
"""What a script of the repository makes, and which."""


def folder_of(weights: str) -> Path:
    """`mini:NAME` as `locate` finds it; anything else is a folder."""
    if weights.startswith("mini:"):
        return locate(weights.removeprefix("mini:"))
    return Path(weights)


def locate(name: str) -> Path:
    """`decoders/image`, `data`, `checkpoint`: shipped; any other name: an asset, fetched once."""
    shipped = (FOLDER / name).resolve()
    if shipped.is_relative_to(FOLDER.resolve()) and shipped.is_dir():
        return shipped
    part = name.partition("/")[0]
    if part in MADE_HERE:
        raise AssetError(f"mini:{name} is not in this installation; {MADE_HERE[part]}")
    from mmllm.mini.assets import fetch

    return fetch(name)
