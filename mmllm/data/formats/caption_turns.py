"""Two-turn conversations about a medium and its caption, with random prompts and replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmllm.conversation import MEDIA, Medium, Message, assistant, user
from mmllm.data.sources import parse_json, read_text, resolve
from mmllm.data.text_fields import Template
from mmllm.errors import ConfigError, EmptyCaptionError, quoted

Direction = Literal["understand", "generate"]


@dataclass(frozen=True, kw_only=True)
class CaptionTurnsConfig:
    """Settings of the two turns that a medium and its caption become.

    Attributes:
        modality: image, audio or video.
        direction: understand or generate, as in `pairs` (mmllm.data.formats.pairs.PairsConfig).
        prompts: what the user writes, as in `pairs`.
        replies: what the model writes, as in `pairs`.
        share: weight of the dataset in the mixture.
    """

    modality: str
    direction: Direction
    prompts: tuple[str, ...] | str
    replies: tuple[str, ...] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.modality not in MEDIA:
            raise ConfigError(f"unknown modality {self.modality!r}; known are {', '.join(MEDIA)}")


class CaptionTurns:
    """A factory of the two turns of a pair.

    Args:
        direction: "understand" (the user shows the medium) or "generate" (the assistant does).
        prompts: templates of the user's text, or the name of a JSON file that holds them.
        replies: templates of the assistant's text; by default the caption for "understand", and no
            text for "generate".
        where: the dataset's place in the config, for messages.
        fields: the fields of all rows; None if they are not known.

    Raises:
        ConfigError: a template is invalid or uses a field that no row has, or the file of prompts
            cannot be read.
    """

    def __init__(
        self,
        direction: Direction,
        prompts: tuple[str, ...] | str,
        replies: Sequence[str],
        where: str,
        fields: Sequence[str] | None = None,
    ):
        self.direction = direction
        self.prompts = [
            Template(text, f"{where}.prompts") for text in _prompts(prompts, f"{where}.prompts")
        ]
        replies = replies or (() if direction == "generate" else ("{caption}",))
        self.replies = [Template(text, f"{where}.replies") for text in replies]
        if fields is None:
            return
        for name, templates in (("prompts", self.prompts), ("replies", self.replies)):
            for template in templates:
                template.check({"caption", *fields}, f"{where}.{name}")

    def conversation(
        self, shown: Medium, row: Mapping[str, Any], rng: np.random.Generator
    ) -> list[Message]:
        """Build the conversation of a pair.

        Args:
            shown: the medium, with its caption.
            row: the fields that fill the `{names}` in prompts and replies.
            rng: draws the prompt, the reply and the order of text and medium.

        Raises:
            EmptyCaptionError: the caption is empty, but needed.
            RowError: a field that a template needs is missing.
        """
        row = {**row, "caption": shown.caption or ""}
        prompt = self.prompts[int(rng.integers(len(self.prompts)))]
        reply = self.replies[int(rng.integers(len(self.replies)))] if self.replies else None
        needed = [*prompt.names, *(reply.names if reply else ())]
        if not row["caption"].strip() and (self.direction == "generate" or "caption" in needed):
            raise EmptyCaptionError(f"{shown!r}: the caption is empty")
        asked, answer = prompt.fill(row, rng), [reply.fill(row, rng)] if reply else []
        if self.direction == "generate":
            return [user(asked), assistant(*answer, shown)]
        parts = (shown, asked) if rng.random() < 0.5 else (asked, shown)  # both orders are common
        return [user(*parts), assistant(*answer)]


def _prompts(prompts: tuple[str, ...] | str, where: str) -> Sequence[str]:
    """Return a list of prompts, or read the list that `file.json#key.key` names."""
    found: Any = prompts
    if isinstance(prompts, str):
        file, _, keys = prompts.partition("#")
        try:
            found = parse_json(read_text(resolve(file)))
            for key in filter(None, keys.split(".")):
                found = found[key]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{where}: {prompts!r} cannot be read: {error!r}") from error
    if (
        not isinstance(found, list | tuple)
        or not found
        or not all(isinstance(prompt, str) for prompt in found)
    ):
        raise ConfigError(f"{where}: expected a list of at least one text, got {quoted(found)}")
    return found
