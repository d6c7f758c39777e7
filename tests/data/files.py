"""Tiny real files, as users have them: pictures, sounds, clips, tables, shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm import config
from mmllm.conversation import Audio, Image, Message, Text, Video
from mmllm.training.feed import open_sources

RNG = np.random.default_rng


def picture(path: Path, value: int = 0) -> Path:
    """A plain PNG of its own grey."""
    return Image.from_numpy(np.full((6, 8, 3), value, np.uint8)).save(path)


def sound(path: Path, hertz: float = 440.0) -> Path:
    times = np.arange(1600) / 16_000
    return Audio.from_numpy(np.sin(2 * np.pi * hertz * times).astype(np.float32), 16_000).save(path)


def clip(path: Path, value: int = 0) -> Path:
    return Video.from_numpy(np.full((4, 16, 16, 3), value, np.uint8), 4.0).save(path)


def write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(list(rows))
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def source(kind: str, **fields: Any) -> Any:
    """The rows of a dataset with this config, opened as training opens them."""
    entry = config.parse_component("data", {"type": kind, **fields}, "data")
    return open_sources({"data": entry}, "stage")["data"]


def contents(messages: Sequence[Message]) -> list[tuple[str, list[str]]]:
    """[(role, [text, or modality=caption])]."""
    return [
        (
            message.role,
            [
                part.text if isinstance(part, Text) else f"<{part.modality}={part.caption}>"
                for part in message.parts
            ],
        )
        for message in messages
    ]


def grey(message: Message) -> list[int]:
    """The grey level of each image or video of a message, decoded."""
    return [int(medium.to_numpy().flat[0]) for medium in message.media]
