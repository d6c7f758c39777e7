"""NExT-GPT's files exactly as they are on disk (Wu et al. 2023; its `data/prepare_data.py`).

    pairs           [{caption, image_name | video_name | audio_name, id | audio_id}]
    comprehension   [{input_image | …: file, conversations}]
    generation      [{output_image | …: file, image_captions | …: text, conversations}]
    instructions    [{image_captions | …: [text], conversations}], [{input_image: [file], …}]
    raw MosIT       [{conversation, image_list: [{image_name, data_source, caption}], …}]

The kind is seen row by row. `…_caption_embeddings` name pickled arrays of one decoder's text
encoder; they are not opened: the feature cache makes these targets for any decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import MEDIA, Medium, Message, Text
from mmllm.data.phrasing import Direction, Phrasing
from mmllm.data.sources import medium, read_rows
from mmllm.data.turns import as_list, checked, converse, queues, role_of
from mmllm.errors import ConfigError, RowError

FOLDERS = {"image": "images", "audio": "audios", "video": "videos"}
"""Where NExT-GPT keeps each modality, below the file's own folder."""

_TAGS = re.compile(rf"\s*<({'|'.join(MEDIA)})>(.*?)</\1>\s*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class NextGPTConfig:
    """`root`: the file's folder, unless given. `folders`: modality -> folder below `root`; left
    out, these are images, audios and videos where there are such folders, else `root` itself.

    `direction`, `prompts` and `replies` are for files of pairs (see `pairs`); the other kinds
    bring their own words.
    """

    file: str
    root: str | None = None
    folders: Mapping[str, str] | None = None
    direction: Direction | None = None
    prompts: tuple[str, ...] | str = ()
    replies: tuple[str, ...] = ()
    share: float = 1.0


class NextGPT:
    """See NextGPTConfig; a row is one conversation."""

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
        self.phrasing: Phrasing | None = None
        if config.direction is not None:
            self.phrasing = Phrasing(config.direction, config.prompts, config.replies, where)
        elif not {"conversations", "conversation"} & self.rows[0].keys():
            raise ConfigError(
                f"{where}: {config.file} holds pairs; say how they are asked about: `direction` "
                "(understand or generate) and `prompts`"
            )
        self.share = config.share

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        row = self.rows[index]
        if "conversations" in row:
            return converse(
                row["conversations"], queues(self._inputs(row)), queues(self._made(row))
            )
        if "conversation" in row:
            return self._mosit(row)
        return self._pair(row, rng)

    def name(self, index: int) -> str:
        row = self.rows[index]
        named = [f"{way}_{key}" for key in MEDIA for way in ("input", "output")]
        for key in ("id", "audio_id", *named, *(f"{key}_name" for key in MEDIA)):
            if row.get(key) is not None:
                return f"{index} ({as_list(row[key])[0]})" if as_list(row[key]) else str(index)
        return str(index)

    def _inputs(self, row: Mapping[str, Any]) -> list[Medium]:
        return [
            medium(key, file, self.roots[key], None)
            for key in MEDIA
            for file in as_list(row.get(f"input_{key}"))
        ]

    def _made(self, row: Mapping[str, Any]) -> list[Medium]:
        """Files and captions of what the assistant makes; either may be missing."""
        made = []
        for key in MEDIA:
            files, captions = as_list(row.get(f"output_{key}")), as_list(row.get(f"{key}_captions"))
            if files and captions and len(files) != len(captions):
                raise RowError(f"{len(files)} output_{key} but {len(captions)} {key}_captions")
            count = max(len(files), len(captions))
            files, captions = files or [None] * count, captions or [None] * count
            made += [
                medium(key, file, self.roots[key], caption and str(caption).strip())
                for file, caption in zip(files, captions, strict=True)
            ]
        return made

    def _pair(self, row: Mapping[str, Any], rng: np.random.Generator) -> Sequence[Message]:
        named = [key for key in MEDIA if f"{key}_name" in row]
        if len(named) != 1 or "caption" not in row:
            raise RowError(
                f"neither a pair nor a conversation: a row with fields {', '.join(row) or 'none'}"
            )
        if self.phrasing is None:
            raise RowError("a pair among conversations: `direction` and `prompts` are not given")
        caption = str(row["caption"] or "").strip()  # WebVid's end in line breaks
        shown = medium(named[0], row[f"{named[0]}_name"], self.roots[named[0]], caption)
        return self.phrasing.conversation(shown, {**row, "caption": caption}, rng)

    def _mosit(self, row: Mapping[str, Any]) -> list[Message]:
        """`<Image>name</Image>` is the medium of that name in the row's lists; a tag around
        anything else is a description for whoever looked for the media, and is left out."""
        listed = {
            (key, entry[f"{key}_name"]): medium(
                key, entry[f"{key}_name"], self.roots[key], str(entry.get("caption") or "").strip()
            )
            for key in MEDIA
            for entry in as_list(row.get(f"{key}_list"))
            if isinstance(entry, Mapping) and entry.get(f"{key}_name")
        }
        messages = []
        for turn in as_list(row["conversation"]):
            role = role_of(turn)
            pieces = _TAGS.split(str(turn.get("value") or ""))  # text, tag, content, text, …
            parts: list[Text | Medium] = [Text(pieces[0])] if pieces[0] else []
            for tag, content, rest in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
                if found := listed.get((tag.lower(), content.strip())):
                    parts.append(found)
                if rest:
                    parts.append(Text(rest))
            messages.append(Message(role, tuple(parts)))
        return checked(messages)


def build(config: NextGPTConfig, *, where: str) -> NextGPT:
    return NextGPT(config, where)
