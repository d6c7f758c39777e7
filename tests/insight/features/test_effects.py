"""Media made under an addition to the states of signal tokens."""

from __future__ import annotations

import numpy as np
import torch

from mmllm.conversation import assistant, user
from mmllm.data.batch import collate
from mmllm.insight.features.effects import REQUESTS, made_under, modalities_made
from mmllm.model import AnyToAny
from tests.samples import picture


def test_only_the_addition_makes_a_difference(tiny_model: AnyToAny) -> None:
    push = 30 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain, pushed, again = made_under(
        tiny_model, "layers.0", torch.stack([torch.zeros(32), push, push]), "image", seed=3
    )
    assert np.array_equal(pushed.to_numpy(), again.to_numpy())
    assert not np.array_equal(plain.to_numpy(), pushed.to_numpy())
    request, words = REQUESTS["image"]
    rendered = tiny_model.renderer.render([user(request), assistant(words, picture(caption="x"))])
    batch = collate([rendered], None, tiny_model.batch_layout, targets=False)
    with torch.no_grad():
        states = tiny_model.hidden(batch).flatten(0, 1)
        signals = {"image": states[batch.outputs["image"].token_indices]}
        condition = tiny_model.condition(signals)["image"]
    (expected,) = tiny_model.decoders["image"].sample(
        condition, generators=[torch.Generator().manual_seed(3)]
    )
    difference = plain.to_numpy().astype(float) - expected.to_numpy()
    assert np.abs(difference).max() <= 1


def test_every_modality_that_is_made_can_be_asked_for(tiny_model: AnyToAny) -> None:
    assert list(modalities_made(tiny_model)) == ["image", "audio", "video"]
