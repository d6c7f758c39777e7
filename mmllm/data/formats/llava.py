"""Reader of LLaVA's format (Liu et al. 2023): `{id, image: file, conversations: [{from, value}]}`.

The text holds `<image>` at the place of the image. Common extensions are read too: several images
in a list, `video` and `audio` in addition to `image`, .jsonl and Parquet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmllm.conversation import Message
from mmllm.data.formats.turns import columns, converse
from mmllm.data.sources import open_rows, require, select
from mmllm.errors import RowError, quoted


@dataclass(frozen=True)
class LlavaConfig:
    """Settings of a dataset in LLaVA's format.

    Attributes:
        file: a .json, .jsonl or .parquet file.
        root: the folder of the media; the folder of the file by default.
        where: keep only the rows whose fields have these values.
        share: weight of the dataset in the mixture.
    """

    file: str
    root: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


class Llava:
    """A dataset in LLaVA's format, see LlavaConfig; each row is one conversation."""

    def __init__(self, config: LlavaConfig, where: str):
        rows, self.root = open_rows(config.file, config.root, where)
        require(rows, ["conversations"], where)
        self.rows = select(rows, config.where, where)
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
        row = self.rows[index]
        turns = row.get("conversations")
        if not isinstance(turns, list):
            raise RowError(f"no list `conversations` in a row with fields {quoted(list(row))}")
        media = columns(row, self.root)
        return converse(turns, media, media)

    def name(self, index: int) -> str:
        """See DataSource."""
        return str(self.rows[index].get("id") or index)


def build(config: LlavaConfig, *, where: str) -> Llava:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return Llava(config, where)
