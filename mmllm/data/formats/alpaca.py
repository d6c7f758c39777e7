"""Alpaca's instructions (Taori et al. 2023): `{instruction, input, output}`, text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmllm.conversation import Message, assistant, user
from mmllm.data.sources import open_rows, require, select
from mmllm.data.text_fields import text_of
from mmllm.errors import RowError


@dataclass(frozen=True)
class AlpacaConfig:
    """An `input` comes in a paragraph of its own behind the instruction. `where` keeps the rows
    whose fields have these values."""

    file: str
    where: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


class Alpaca:
    """See AlpacaConfig; one conversation of two turns a row."""

    def __init__(self, config: AlpacaConfig, where: str):
        rows, _ = open_rows(config.file, None, where)
        require(rows, ("instruction", "output"), where)
        self.rows = select(rows, config.where, where)
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        row = self.rows[index]
        instruction, more, output = (
            text_of(row.get(field), rng, field) for field in ("instruction", "input", "output")
        )
        if not instruction.strip() or not output.strip():
            raise RowError("`instruction` or `output` is empty or missing")
        return [
            user(f"{instruction}\n\n{more}" if more.strip() else instruction),
            assistant(output),
        ]

    def name(self, index: int) -> str:
        return str(index)


def build(config: AlpacaConfig, *, where: str) -> Alpaca:
    return Alpaca(config, where)
