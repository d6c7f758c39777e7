"""Reader of NExT-GPT's dataset files as they are published (Wu et al. 2023).

    pairs           [{caption, image_name | video_name | audio_name, id | audio_id}]
    comprehension   [{input_image | …: file, conversations}]
    generation      [{output_image | …: file, image_captions | …: text, conversations}]
    instructions    [{image_captions | …: [text], conversations}], [{input_image: [file], …}]
    raw MosIT       [{conversation, image_list: [{image_name, data_source, caption}], …}]

The kind is detected for each row (see `data/prepare_data.py` of NExT-GPT). The fields
`…_caption_embeddings` name pickled outputs of one decoder's text encoder; they are not opened: the
feature cache computes these targets for any decoder.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import MEDIA, Medium, Message
from mmllm.data.formats.caption_turns import CaptionTurns, Direction
from mmllm.data.formats.turns import as_list, converse, queues, role_of, woven
from mmllm.data.sources import medium, read_rows
from mmllm.data.text_fields import caption_of
from mmllm.errors import ConfigError, RowError, quoted

FOLDERS = {"image": "images", "audio": "audios", "video": "videos"}
"""Modality -> folder of its media in NExT-GPT's datasets, below the folder of the file."""

_TAG = re.compile(rf"<(/?)({'|'.join(MEDIA)})>", re.IGNORECASE)


@dataclass(frozen=True)
class NextGPTConfig:
    """Settings of a dataset in NExT-GPT's format.

    `direction`, `prompts` and `replies` are for files of pairs (see `pairs`); the other kinds hold
    their own texts.

    Attributes:
        file: a .json or .jsonl file.
        root: the folder of the media; the folder of the file by default.
        folders: modality -> folder below `root`; by default images, audios and videos if these
            folders exist, else `root` itself.
        share: weight of the dataset in the mixture.
    """

    file: str
    root: str | None = None
    folders: Mapping[str, str] | None = None
    direction: Direction | None = None
    prompts: tuple[str, ...] | str = ()
    replies: tuple[str, ...] = ()
    share: float = 1.0


class NextGPT:
    """A dataset in NExT-GPT's format, see NextGPTConfig; each row is one conversation."""

    def __init__(self, config: NextGPTConfig, where: str):
        self.rows, root = read_rows(config.file, config.root, where)
        unknown = set(config.folders or {}) - MEDIA.keys()
        if unknown:
            raise ConfigError(
                f"{where}.folders: unknown modality {sorted(unknown)[0]!r}; known are "
                f"{', '.join(MEDIA)}"
            )
        usual = {key: name for key, name in FOLDERS.items() if (root / name).is_dir()}
        folders = usual if config.folders is None else config.folders
        self.roots: dict[str, Path] = {key: root / folders.get(key, "") for key in MEDIA}
        self.turns: CaptionTurns | None = None
        if config.direction is not None:
            self.turns = CaptionTurns(
                config.direction, config.prompts, config.replies, where, self.rows.columns
            )
        elif not {"conversations", "conversation"}.intersection(self.rows.columns):
            raise ConfigError(
                f"{where}: {config.file} holds pairs; say how they are asked about: `direction` "
                "(understand or generate) and `prompts`"
            )
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
        row = self.rows[index]
        if "conversations" in row:
            return converse(
                row["conversations"], queues(self._inputs(row)), queues(self._made(row, rng))
            )
        if "conversation" in row:
            return self._mosit(row, rng)
        return self._pair(row, rng)

    def name(self, index: int) -> str:
        """See DataSource."""
        row = self.rows[index]
        named = [f"{way}_{key}" for key in MEDIA for way in ("input", "output")]
        for key in ("id", "audio_id", *named, *(f"{key}_name" for key in MEDIA)):
            if row.get(key) is not None:
                return f"{index} ({as_list(row[key])[0]})" if as_list(row[key]) else str(index)
        return str(index)

    def _inputs(self, row: Mapping[str, Any]) -> list[Medium]:
        """Return the input media of a row."""
        return [
            medium(key, file, self.roots[key], None)
            for key in MEDIA
            for file in as_list(row.get(f"input_{key}"))
        ]

    def _made(self, row: Mapping[str, Any], rng: np.random.Generator) -> list[Medium]:
        """Return the output media of a row; either files or captions may be missing."""
        made = []
        for key in MEDIA:
            files, captions = as_list(row.get(f"output_{key}")), as_list(row.get(f"{key}_captions"))
            if files and captions and len(files) != len(captions):
                raise RowError(f"{len(files)} output_{key} but {len(captions)} {key}_captions")
            count = max(len(files), len(captions))
            files, captions = files or [None] * count, captions or [None] * count
            made += [
                medium(key, file, self.roots[key], caption_of(caption, rng) or None)
                for file, caption in zip(files, captions, strict=True)
            ]
        return made

    def _pair(self, row: Mapping[str, Any], rng: np.random.Generator) -> Sequence[Message]:
        """Convert a row of a file of pairs. Raises RowError."""
        named = [key for key in MEDIA if f"{key}_name" in row]
        if len(named) != 1 or "caption" not in row:
            raise RowError(
                f"neither a pair nor a conversation: a row with fields {quoted(list(row))}"
            )
        if self.turns is None:
            raise RowError("a pair among conversations: `direction` and `prompts` are not given")
        caption = caption_of(row["caption"], rng)
        shown = medium(named[0], row[f"{named[0]}_name"], self.roots[named[0]], caption)
        return self.turns.conversation(shown, row, rng)

    def _mosit(self, row: Mapping[str, Any], rng: np.random.Generator) -> list[Message]:
        """Convert a row of raw MosIT. `<Image>name</Image>` is the medium of that name in the row's
        lists; a tag around another text is a description for annotators, and is removed."""
        listed = {
            (key, entry[f"{key}_name"]): medium(
                key, entry[f"{key}_name"], self.roots[key], caption_of(entry.get("caption"), rng)
            )
            for key in MEDIA
            for entry in as_list(row.get(f"{key}_list"))
            if isinstance(entry, Mapping) and entry.get(f"{key}_name")
        }
        messages = []
        for turn in as_list(row["conversation"]):
            role, text = role_of(turn), turn.get("value")
            if not isinstance(text, str):
                raise RowError(f"a turn of {role!r} has no text, but {quoted(text)}")
            texts, tagged = _split(text)
            parts = woven(texts, [listed.get(named) for named in tagged])
            messages.append(Message(role, tuple(parts)))
        return messages


def _split(text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Split a text at its tags: the texts between tags, and (modality, content) of each tag.

    A tag ends at the next closing tag of its modality, even if more tags open before it; a tag
    that is not closed is text. Each tag is visited once, so the time is linear, which it would not
    be with one regular expression.
    """
    marks = list(_TAG.finditer(text))
    ends = {key: deque(m for m in marks if m[1] and m[2].lower() == key) for key in MEDIA}
    texts, tagged, done = [], [], 0
    for mark in marks:
        if mark[1] or mark.start() < done:
            continue
        key = mark[2].lower()
        while ends[key] and ends[key][0].start() < mark.end():
            ends[key].popleft()
        if ends[key]:
            end = ends[key].popleft()
            texts.append(text[done : mark.start()])
            tagged.append((key, text[mark.end() : end.start()].strip()))
            done = end.end()
    return [*texts, text[done:]], tagged


def build(config: NextGPTConfig, *, where: str) -> NextGPT:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    return NextGPT(config, where)
