"""Chats that follow a script, and media whose level encodes their concept."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import MEDIA, Audio, Conversation, Medium, Message
from mmllm.evaluation.judges import Judge
from mmllm.evaluation.labels import LabelMatcher
from mmllm.evaluation.prompts import EvalItem, read_test_items

CONCEPTS = ("dog", "cat", "owl", "bat", "ant", "bee", "cow")
LABELS = LabelMatcher({"id": name, "label": name, "synonyms": []} for name in CONCEPTS)


def medium(modality: str, concept: str) -> Medium:
    """A medium that tells its concept by its level."""
    level = 10 * CONCEPTS.index(concept)
    if modality == "audio":
        return Audio.from_numpy(np.full((1, 8), level / 100, np.float32), 16_000)
    shape = (4, 4, 3) if modality == "image" else (2, 4, 4, 3)
    return MEDIA[modality](array=np.full(shape, level, np.uint8))


def levels(media: Sequence[Medium]) -> np.ndarray:
    """One-hot features of `medium`."""
    features = np.zeros((len(media), len(CONCEPTS)))
    for row, medium in enumerate(media):
        value = float(medium.to_numpy().mean()) * (10 if medium.modality == "audio" else 0.1)
        features[row, round(value)] = 1
        features[row] -= 0.01 * np.abs(np.arange(len(CONCEPTS)) - round(value))
    return features


JUDGES = {m: Judge(levels, {c: medium(m, c) for c in CONCEPTS}) for m in MEDIA}


@dataclass
class ScriptedReply:
    message: Message
    ids: Sequence[int] = ()

    @property
    def media(self) -> list[Medium]:
        return self.message.media


class ScriptedChat:
    """Answers every conversation by `script(conversation)`; notes how it was asked."""

    def __init__(self, script):
        self.script = script
        self.calls: list[tuple[list[Conversation], list[int]]] = []

    def reply_many(
        self, conversations: Sequence[Conversation], *, seeds: Sequence[int], **options: Any
    ) -> list[ScriptedReply]:
        assert len(seeds) == len(conversations)
        self.calls.append((list(conversations), list(seeds)))
        return [ScriptedReply(self.script(conversation)) for conversation in conversations]


def items_from(tmp_path: Path, entries: list[dict]) -> dict[str, list[EvalItem]]:
    file = tmp_path / "tests.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    return read_test_items(file)
