"""Reader of pairs in CSV, TSV, Parquet or JSON with any column names: CC3M, AudioCaps, WebVid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import Message
from mmllm.data.formats.caption_turns import CaptionTurns, CaptionTurnsConfig
from mmllm.data.formats.turns import embedded
from mmllm.data.sources import open_rows, resolve, select
from mmllm.data.tables import Table
from mmllm.data.text_fields import Template, caption_of
from mmllm.errors import ConfigError
from mmllm.utils.hints import did_you_mean


@dataclass(frozen=True, kw_only=True)
class TableConfig(CaptionTurnsConfig):
    """Settings of a table of pairs; give either `path` or `embedded`.

    Attributes:
        file: the table, or a pattern: `train-*.parquet`.
        path: the file of a row below `root`, with columns in braces: `{audiocap_id}.wav`,
            `{page_dir}/{videoid}.mp4`.
        embedded: the Parquet column that holds the file itself, as `datasets` writes images and
            audio.
        caption: the column of captions, texts or lists of texts of which one is drawn.
        header: the column names of a text file that has no header.
        root: the folder of the media; the folder of the file by default.
        where: keep only the rows that have these values.

    Columns can be used as `{names}` in prompts and replies.
    """

    file: str
    path: str | None = None
    embedded: str | None = None
    caption: str = "caption"
    header: tuple[str, ...] = ()
    root: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)


class Captions:
    """A table of pairs, see TableConfig; each row is a conversation of two turns."""

    def __init__(self, config: TableConfig, where: str):
        if (config.path is None) == (config.embedded is None):
            raise ConfigError(f"{where}: give `path` or `embedded`, one of them")
        if config.header:
            path = resolve(config.file)
            rows: Any = Table.open(path, f"{where}.file", config.header)
            self.root = resolve(config.root) if config.root else path.parent
        else:
            rows, self.root = open_rows(config.file, config.root, where)
        columns = rows.columns
        self.path = None if config.path is None else Template(config.path, f"{where}.path")
        if config.path in columns:  # without braces every row would name the same file
            raise ConfigError(
                f"{where}.path: {config.path!r} is a column; write path: '{{{config.path}}}' where "
                f"it names files, or embedded: {config.path} where it holds them"
            )
        used = self.path.names if self.path else [str(config.embedded)]
        for name in (*used, config.caption):
            if name not in columns:
                hint = did_you_mean(name, columns)
                raise ConfigError(
                    f"{where}: {config.file} has no column {name!r}{hint}; there are "
                    f"{', '.join(columns)}"
                )
        self.rows = select(rows, config.where, where)
        self.turns = CaptionTurns(config.direction, config.prompts, config.replies, where, columns)
        self.config = config
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
        row, config = self.rows[index], self.config
        caption = caption_of(row.get(config.caption), rng)
        value = self.path.fill(row, rng) if self.path else row.get(str(config.embedded))
        shown = embedded(config.modality, value, self.root, caption)
        return self.turns.conversation(shown, {**row, config.caption: caption}, rng)

    def name(self, index: int) -> str:
        """See DataSource."""
        row = self.rows[index]
        if self.path:
            return self.path.fill(row, np.random.default_rng(0))
        value = row.get(self.config.embedded or "")
        path = value.get("path") if isinstance(value, Mapping) else None
        return f"{index} ({Path(path).name})" if path else str(index)


def build(config: TableConfig, *, where: str) -> Captions:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return Captions(config, where)
