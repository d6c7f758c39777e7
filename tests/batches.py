"""Batches of rendered conversations, and their losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmllm import losses
from mmllm.conversation import Message, assistant, user
from mmllm.data.batch import Batch, collate
from mmllm.features.cache import FeatureCache
from mmllm.losses import LossTerm
from mmllm.model import AnyToAny
from tests.samples import clip, picture, sound

WEIGHTS = {"text": 1.0, "first_token": 0.3, "align": 0.5, "denoise": 0.1}
MIXED = [
    [user(picture(30), "what is this?"), assistant("a red apple")],
    [user("draw"), assistant("here", picture(90, caption="a red apple"))],
    [
        user(sound(0.5), "and", clip(60), "and", picture(200)),
        assistant("one", sound(0.1, caption="a violin"), "two", clip(9, caption="a rocket")),
        user("hello"),
        assistant("three four"),
    ],
    [user("hello"), assistant("one two three")],
]


def batch_of(model: AnyToAny, conversations: Sequence[Sequence[Message]], **options) -> Batch:
    """The batch of some conversations, whose seeds are their numbers."""
    options.setdefault("seeds", list(range(len(conversations))))
    return collate(
        [model.renderer.render(conversation) for conversation in conversations],
        FeatureCache(model, denoise=True),
        model.batch_layout,
        **options,
    )


def terms_of(model: AnyToAny, batch: Batch) -> dict[str, LossTerm]:
    """The loss terms of a batch by name."""
    return losses.compute(losses.build_losses(model, WEIGHTS), model(batch), batch)


def loss_of(model: AnyToAny, batch: Batch) -> torch.Tensor:
    """The scalar that a single process differentiates."""
    weighted = losses.build_losses(model, WEIGHTS)
    terms = losses.compute(weighted, model(batch), batch)
    return losses.total_loss(weighted, terms, losses.num_targets(weighted, [batch]))
