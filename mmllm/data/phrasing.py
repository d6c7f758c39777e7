"""A medium and its caption -> a question and its answer, in one of many phrasings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmllm.conversation import MEDIA, Medium, Message, assistant, user
from mmllm.data.sources import resolve
from mmllm.errors import ConfigError, EmptyCaptionError

Direction = Literal["understand", "generate"]


@dataclass(frozen=True, kw_only=True)
class PhrasingConfig:
    """How a pair is asked about; the fields mean what they mean for `pairs`
    (mmllm.data.pairs.PairsConfig)."""

    modality: str
    direction: Direction
    prompts: tuple[str, ...] | str
    replies: tuple[str, ...] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.modality not in MEDIA:
            raise ConfigError(f"unknown modality {self.modality!r}; known are {', '.join(MEDIA)}")


class Phrasing:
    """Makes the two turns of a pair. Raises ConfigError if there are no prompts."""

    def __init__(
        self,
        direction: Direction,
        prompts: tuple[str, ...] | str,
        replies: Sequence[str],
        where: str,
    ):
        self.direction = direction
        self.prompts = _prompts(prompts, f"{where}.prompts")
        self.replies = replies or (() if direction == "generate" else ("{caption}",))

    def conversation(
        self, shown: Medium, row: Mapping[str, Any], rng: np.random.Generator
    ) -> list[Message]:
        """`row` fills the `{names}` in prompts and replies. Raises EmptyCaptionError where the
        caption is needed."""
        replies = self.replies
        prompt = self.prompts[int(rng.integers(len(self.prompts)))]
        reply = replies[int(rng.integers(len(replies)))] if replies else None
        if not (shown.caption or "").strip() and (
            self.direction == "generate" or "{caption}" in f"{prompt}{reply}"
        ):
            raise EmptyCaptionError(f"{shown!r}: the caption is empty")
        asked, said = _fill(prompt, row), [_fill(reply, row)] if reply is not None else []
        if self.direction == "generate":
            return [user(asked), assistant(*said, shown)]
        parts = (shown, asked) if rng.random() < 0.5 else (asked, shown)  # people do both
        return [user(*parts), assistant(*said)]


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
