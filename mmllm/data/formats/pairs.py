"""Reader of pairs of a medium and its caption, in one direction: the data of stages 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mmllm.conversation import Message
from mmllm.data.formats.caption_turns import CaptionTurns
from mmllm.data.sources import medium, read_rows, select
from mmllm.data.text_fields import caption_of, is_nothing


@dataclass(frozen=True)
class PairsConfig:
    """Settings of a dataset of rows `{file, modality, caption}` in a .json or .jsonl file.

    Attributes:
        file: the .json or .jsonl file.
        direction: "understand": the user shows the medium with one of `prompts`, in either order,
            and the reply is one of `replies`. "generate": the user writes one of `prompts`, and the
            reply is the medium, after one of `replies` if there are any.
        prompts: `{caption}` is filled in, `{name}` is any other text field of the row. The list may
            be in a JSON file: `prompts.json#draw.train` is the list under these keys.
        modality: image, audio or video: the rows of another one are left out.
        replies: as `prompts`; by default the caption for "understand".
        root: the folder of the media; the folder of the file by default.
        where: keep only the rows whose fields have these values.
        share: weight of the dataset in the mixture.
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
    """A dataset of pairs, see PairsConfig; each row is a conversation of two turns."""

    def __init__(self, config: PairsConfig, where: str):
        rows, self.root = read_rows(config.file, config.root, where)
        self.rows = select(rows, {"modality": config.modality, **config.where}, where)
        self.turns = CaptionTurns(
            config.direction, config.prompts, config.replies, where, self.rows.columns
        )
        self.config = config
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
        row = self.rows[index]
        caption = caption_of(row.get("caption"), rng)
        file = None if is_nothing(row.get("file")) else row["file"]
        shown = medium(self.config.modality, file, self.root, caption)
        return self.turns.conversation(shown, row, rng)

    def name(self, index: int) -> str:
        """See DataSource."""
        row = self.rows[index]
        return str(row.get("file") or row.get("caption"))


def build(config: PairsConfig, *, where: str) -> Pairs:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return Pairs(config, where)
