"""Prompts, choices and a model that the tests of inference share."""

from __future__ import annotations

import torch

from mmllm.conversation import assistant, user
from mmllm.model import AnyToAny
from tests.samples import clip, picture, sound

PROMPTS = [
    [user("hello")],
    [user(picture(40), "what is this? one two three four")],
    [user(sound(0.2), "and", clip(80)), assistant("one"), user("draw a red apple")],
]
ALL = {"image": "force", "audio": "force", "video": "force"}


def eager(model: AnyToAny, key: str) -> AnyToAny:
    """Make the model begin signal spans of `key` by itself, whenever it may."""
    head = model.llm.head

    def biased(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        logits[..., model.llm.tokens.logit_index(key)] += 1e4
        return logits

    model.llm.head = biased
    return model
