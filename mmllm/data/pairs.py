"""Pairs of a medium and its caption, asked about in one direction: the data of stages 1 and 2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mmllm.conversation import Message, assistant, user
from mmllm.data.sources import medium, read_rows, resolve, select
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class PairsConfig:
    """Rows of `{file, modality, caption}` in a .json or .jsonl file.

    understand: the user shows the medium with one of `prompts` (half of the time the question
    comes first), the reply is one of `replies` (the caption, unless given). generate: the user asks
    by one of `prompts`, the reply is the medium, after one of `replies` if there are any.
    `{caption}` in a prompt or reply is filled in; `{name}` takes any other text field of the row.
    Prompts may stand in a JSON file: `prompts.json#draw.train` is the list under these keys.
    `where` keeps the rows whose fields have these values. `root`: the folder of the media.
    """

    file: str
    direction: Literal["understand", "generate"]
    prompts: tuple[str, ...] | str
    modality: str
    replies: tuple[str, ...] = ()
    root: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


class Pairs:
    """See PairsConfig; one conversation of two turns a row."""

    def __init__(self, config: PairsConfig, where: str):
        rows, self.root = read_rows(config.file, config.root, where)
        rows = select(rows, {"modality": config.modality, **config.where}, where)
        self.prompts = _prompts(config.prompts, f"{where}.prompts")
        self.config = config
        self.rows = rows
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        row, config = self.rows[index], self.config
        shown = medium(config.modality, row.get("file"), self.root, row.get("caption"))
        prompt = _fill(self.prompts[int(rng.integers(len(self.prompts)))], row)
        replies = config.replies or (() if config.direction == "generate" else ("{caption}",))
        reply = [_fill(replies[int(rng.integers(len(replies)))], row)] if replies else []
        if config.direction == "generate":
            return [user(prompt), assistant(*reply, shown)]
        parts = (shown, prompt) if rng.random() < 0.5 else (prompt, shown)  # people do both
        return [user(*parts), assistant(*reply)]

    def name(self, index: int) -> str:
        row = self.rows[index]
        return str(row.get("file") or row.get("caption"))


def build(config: PairsConfig, *, where: str) -> Pairs:
    return Pairs(config, where)


def _prompts(prompts: tuple[str, ...] | str, where: str) -> Sequence[str]:
    """The list itself, or the list that `file.json#key.key` names."""
    found: Any = prompts
    if isinstance(prompts, str):
        file, _, keys = prompts.partition("#")
        try:
            found = json.loads(resolve(file).read_text(encoding="utf-8"))
            for key in filter(None, keys.split(".")):
                found = found[key]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{where}: {prompts!r} cannot be read: {error!r}") from error
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise ConfigError(f"{where}: expected a list of at least one text")
    return found


def _fill(template: str, row: Mapping[str, Any]) -> str:
    try:
        return template.format_map(row)
    except KeyError as error:
        raise ConfigError(f"prompt {template!r}: the row has no field {error}") from error
