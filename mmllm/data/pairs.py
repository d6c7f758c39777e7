"""Pairs of a medium and its caption, asked about in one direction: the data of stages 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mmllm.conversation import Message, assistant, user
from mmllm.data.sources import medium, read_rows, select
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class PairsConfig:
    """Rows of `{file, modality, caption}` in a .json or .jsonl file.

    understand: the user shows the medium with one of `prompts`, the reply is the caption (or one
    of `replies`). generate: the user asks by one of `prompts`, the reply is the medium. `{caption}`
    in a prompt or reply is filled in; `{name}` takes any other text field of the row.
    `where` keeps the rows whose fields have these values. `root`: the folder of the media.
    """

    file: str
    direction: Literal["understand", "generate"]
    prompts: tuple[str, ...]
    modality: str
    replies: tuple[str, ...] = ("{caption}",)
    root: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


class Pairs:
    """See PairsConfig; one conversation of two turns a row."""

    def __init__(self, config: PairsConfig, where: str):
        rows, self.root = read_rows(config.file, config.root, where)
        rows = select(rows, {"modality": config.modality, **config.where}, where)
        if not config.prompts:
            raise ConfigError(f"{where}.prompts: expected at least one")
        self.config = config
        self.rows = rows
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        row, config = self.rows[index], self.config
        shown = medium(config.modality, row.get("file"), self.root, row.get("caption"))
        prompt = _fill(config.prompts[rng.integers(len(config.prompts))], row)
        if config.direction == "generate":
            return [user(prompt), assistant(shown)]
        reply = _fill(config.replies[rng.integers(len(config.replies))], row)
        return [user(shown, prompt), assistant(reply)]

    def name(self, index: int) -> str:
        row = self.rows[index]
        return str(row.get("file") or row.get("caption"))


def build(config: PairsConfig, *, where: str) -> Pairs:
    return Pairs(config, where)


def _fill(template: str, row: Mapping[str, Any]) -> str:
    try:
        return template.format_map(row)
    except KeyError as error:
        raise ConfigError(f"prompt {template!r}: the row has no field {error}") from error
