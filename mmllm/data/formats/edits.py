"""Reader of editing pairs: pictures, an instruction, and the picture that they become.

The columns are those of InstructPix2Pix, MagicBrush, UltraEdit and others by whatever name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmllm.conversation import Message, assistant, user
from mmllm.data.formats.turns import as_list, embedded
from mmllm.data.sources import open_rows, require, select
from mmllm.data.text_fields import caption_of
from mmllm.errors import EmptyCaptionError, RowError


@dataclass(frozen=True)
class EditsConfig:
    """Settings of a dataset of editing pairs.

    Attributes:
        file: a .json, .jsonl, .csv, .tsv or .parquet file.
        source: the column of the pictures that are edited: a file, a list of files, or the bytes of
            them as `datasets` stores pictures.
        instruction: the column of what the user writes.
        target: the column of the picture that is made.
        caption: the column of what the target shows, the target of the loss `align`; null: the
            instruction is its caption.
        reply: what the model writes in front of the picture; null: nothing.
        root: the folder of the pictures; the folder of the file by default.
        where: keep only the rows whose fields have these values.
        share: weight of the dataset in the mixture.
    """

    file: str
    source: str = "source"
    instruction: str = "instruction"
    target: str = "target"
    caption: str | None = None
    reply: str | None = None
    root: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


class Edits:
    """A dataset of editing pairs, see EditsConfig; each row is a conversation of two turns."""

    def __init__(self, config: EditsConfig, where: str):
        rows, self.root = open_rows(config.file, config.root, where)
        names = [config.source, config.instruction, config.target]
        require(rows, names + ([config.caption] if config.caption else []), where)
        self.rows = select(rows, config.where, where)
        self.config = config
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
        row, config = self.rows[index], self.config
        instruction = caption_of(row.get(config.instruction), rng)
        caption = caption_of(row.get(config.caption), rng) if config.caption else instruction
        if not instruction or not caption:
            raise EmptyCaptionError("the instruction or the caption is empty")
        sources = [
            embedded("image", each, self.root, None) for each in as_list(row.get(config.source))
        ]
        targets = as_list(row.get(config.target))
        if not sources or len(targets) != 1:
            raise RowError(
                f"expected pictures in {config.source!r} and one in {config.target!r}, got "
                f"{len(sources)} and {len(targets)}"
            )
        target = embedded("image", targets[0], self.root, caption)
        reply = [] if config.reply is None else [config.reply]
        return [user(*sources, instruction), assistant(*reply, target)]

    def name(self, index: int) -> str:
        """See DataSource."""
        return str(self.rows[index].get("id") or index)


def build(config: EditsConfig, *, where: str) -> Edits:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return Edits(config, where)
