"""Reader of Alpaca's instructions (Taori et al. 2023): texts `{instruction, input, output}`."""

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
    """Settings of an Alpaca dataset. An `input` becomes a paragraph after the instruction.

    Attributes:
        file: a .json, .jsonl, .csv, .tsv or .parquet file.
        where: keep only the rows whose fields have these values.
        share: weight of the dataset in the mixture.
    """

    file: str
    where: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


class Alpaca:
    """A dataset in Alpaca's format, see AlpacaConfig; each row is a conversation of two turns."""

    def __init__(self, config: AlpacaConfig, where: str):
        rows, _ = open_rows(config.file, None, where)
        require(rows, ("instruction", "output"), where)
        self.rows = select(rows, config.where, where)
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
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
        """See DataSource."""
        return str(index)


def build(config: AlpacaConfig, *, where: str) -> Alpaca:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return Alpaca(config, where)
