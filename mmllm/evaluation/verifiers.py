"""Verifiers of generated media for `chat.reply(…, verify="judge")` (mmllm.reasoning.verified)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from mmllm import mini
from mmllm.conversation import Message
from mmllm.data.sources import read_text
from mmllm.errors import ConfigError
from mmllm.evaluation.judges import Judge, build_judge
from mmllm.evaluation.labels import LabelMatcher
from mmllm.reasoning.verified import ReplyVerdict


def concept_judge(messages: Sequence[Message]) -> Callable[[Any], ReplyVerdict]:
    """A verifier by mini's judges: the nearest real item of each medium that was made must be of a
    concept that the last message names.

    Raises:
        ConfigError: the last message names no concept of mini's data.
    """
    text = messages[-1].text
    requested = {concept for labels in _labels() for concept in labels.match(text)}
    if not requested:
        raise ConfigError(
            'verify="judge": the request names none of the concepts that mini\'s judges know; give '
            "a function of the reply as verify"
        )

    def verify(reply: Any) -> ReplyVerdict:
        if not reply.media:
            return ReplyVerdict(False, "the reply holds no image, audio or video", -len(_labels()))
        wrong, ranks = [], []
        for medium in reply.media:
            (nearest,) = cached_judge(medium.modality).rank([medium])
            known = [rank for rank, concept in enumerate(nearest) if concept in requested]
            ranks.append(known[0] if known else len(nearest))
            if ranks[-1]:
                wrong.append(f"the {medium.modality} is nearest to {nearest[0]}")
        return ReplyVerdict(not wrong, ", ".join(wrong), -sum(ranks))

    return verify


@cache
def cached_judge(modality: str) -> Judge:
    """The judge of a modality, built once."""
    return build_judge(modality)


@cache
def _labels() -> tuple[LabelMatcher, LabelMatcher]:
    """The names of what is seen and of what sounds."""
    data = mini.locate("data")
    sounds = json.loads(read_text(data / "sounds.json.gz"))["concepts"]
    return LabelMatcher(json.loads(read_text(data / "concepts.json"))), LabelMatcher(sounds)
