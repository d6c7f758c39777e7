"""A study of the tiny model, and a dictionary whose features are known."""

from __future__ import annotations

from pathlib import Path

import torch

from mmllm.conversation import Image
from mmllm.data.rendering import MediaSpan, Rendered
from mmllm.inference.chat import Chat
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.insight.dictionary.training import DictionaryConfig
from mmllm.insight.features.activity import FeatureActivity
from mmllm.insight.study import DictionaryStudy, StudyData
from mmllm.model import AnyToAny
from tests.insight.conversations import VOCABULARY, rendered
from tests.insight.tables import activations

SMALL = DictionaryConfig(width=48, k=4, steps=60, batch_size=64, learning_rate=5e-3)
NUM = 120


def a_study(model: AnyToAny, folder: Path, **options) -> DictionaryStudy:
    data = StudyData(rendered(model, 12), VOCABULARY)
    return DictionaryStudy(
        model, Chat(model).fingerprint, data, folder, config=SMALL, name="tiny", **options
    )


def measured() -> tuple[FeatureActivity, torch.Tensor]:
    """Four features, which are the coordinates of random states; feature 0 is that of concept b."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(NUM, 4, generator=generator)
    number = torch.arange(NUM)
    concepts = (number % 3 - 1).to(torch.int16)
    states[concepts == 1, 0] += 5
    acts = activations(
        states,
        media=torch.where(number % 5 == 1, 0, -1).to(torch.int16),
        concepts=concepts,
        conversations=[
            Rendered(ids=[0], inputs=[MediaSpan("image", Image(f"{index % 7}.png"), 0, 1)])
            for index in range(NUM // 4)
        ],
        concept_names=("a", "b"),
    )
    dictionary = SparseAutoencoder(4, 4, Origin("m", "layers.1", "layers.1"))
    dictionary.W_enc.copy_(torch.eye(4))
    dictionary.W_dec.copy_(torch.eye(4))
    dictionary.threshold.fill_(0.3)
    return FeatureActivity.measure(dictionary, acts), dictionary.encode(states)
