"""Batched replies against single ones."""

import numpy as np
import pytest

from mmllm.conversation import MEDIA, Audio, Image, user
from mmllm.evaluation import batching, tasks
from mmllm.evaluation.prompts import EvalItem
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny
from tests.evaluation.scripted import medium


def test_a_batch_agrees_with_single_calls(tiny_model: AnyToAny) -> None:
    items = [
        EvalItem(f"b/{i}", "b", ((user(text, *media),),))
        for i, (text, media) in enumerate(
            [("Draw a red apple.", ()), ("What?", (medium("image", "cow"),)), ("Play.", ())]
        )
    ]
    chat = Chat(tiny_model)

    class Forced:
        def reply_many(self, conversations, **options):
            modalities = dict.fromkeys(MEDIA, "force")
            return chat.reply_many(conversations, modalities=modalities, **options)

    agreement = batching.compare(Forced(), items)
    assert agreement.same == (True, True, True)
    assert {
        modality: len(differences) for modality, differences in agreement.differences.items()
    } == {
        "image": 3,
        "audio": 3,
        "video": 3,
    }
    assert max(map(max, agreement.differences.values())) <= tasks.MEDIA_TOLERANCE


def test_difference_of_media() -> None:
    def grey(level: int) -> Image:
        return Image.from_numpy(np.full((4, 4, 3), level, np.uint8))

    assert batching.max_difference(grey(9), grey(9)) == 0
    assert batching.max_difference(grey(9), grey(10)) == pytest.approx(1 / 255)  # all of them
    edge = grey(9).to_numpy().copy()
    edge[0, 0, 0] = 10  # one value, one level: rounding
    assert batching.max_difference(grey(9), Image.from_numpy(edge)) == pytest.approx(1 / 48 / 255)
    sounds = [Audio.from_numpy(np.full(8, v, np.float32), 16_000) for v in (0.5, 0.25)]
    assert batching.max_difference(*sounds) == 0.25
    assert batching.max_difference(sounds[0], Audio.from_numpy(np.ones(9, np.float32), 16_000)) > 1
