"""Media of one conversation with several seeds: each is that of its seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmllm import config, model
from mmllm.conversation import Image, Message, user
from mmllm.inference.batching import ContinuousBatcher
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny

ASKED = [user("Draw a red apple, please.")]
WISHES: dict[str, Any] = {"image": "force", "audio": "forbid", "video": "forbid"}
OPTIONS: dict[str, Any] = {"modalities": WISHES, "max_new_tokens": 8}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def system(system_tree: dict, request: pytest.FixtureRequest) -> AnyToAny:
    return model.build(config.parse_system(system_tree), dtype=request.param, seed=0).eval()


def pixels(reply: Any) -> np.ndarray:
    return np.stack([medium.to_numpy() for medium in reply.media]).astype(int)


@pytest.mark.parametrize("prefixes", [0, 2])
def test_a_seeds_picture_in_a_batch_is_the_one_it_gives_alone(
    system: AnyToAny, prefixes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions: list[torch.Tensor] = []
    condition = system.condition

    def noted(signals: dict[str, torch.Tensor]) -> Any:
        conditions.extend(signals["image"])
        return condition(signals)

    monkeypatch.setattr(system, "condition", noted)
    alone = [Chat(system, prefixes=prefixes).reply(ASKED, seed=seed, **OPTIONS) for seed in (5, 6)]
    batch = Chat(system, prefixes=prefixes).reply_many([ASKED] * 2, seeds=[5, 6], **OPTIONS)
    assert all(states.equal(conditions[0]) for states in conditions)
    assert len(conditions) == 4
    for one, other in zip(alone, batch, strict=True):
        assert one.ids == other.ids
        assert one.seed == other.seed
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert np.abs(pixels(batch[0]) - pixels(batch[1])).max() > 20


def test_what_is_alike_is_told_by_what_it_shows(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts with the same words and other media are others; what is drawn is drawn for each."""
    sizes: list[int] = []
    join = ContinuousBatcher.join
    monkeypatch.setattr(
        ContinuousBatcher,
        "join",
        lambda self, entry: sizes.append(len(entry.sequences)) or join(self, entry),
    )

    def seen(value: int) -> list[Message]:
        return [user(Image.from_numpy(np.full((16, 16, 3), value, np.uint8)), "What is this?")]

    talks = [seen(10), seen(200), seen(10), ASKED]
    chat = Chat(tiny_model)
    options = {"modalities": dict.fromkeys(WISHES, "forbid"), "max_new_tokens": 8}
    together = chat.reply_many(talks, **options)
    alone = [chat.reply(talk, **options) for talk in talks]
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert [reply.usage.text for reply in together] == [len(reply.ids) for reply in alone]
    drawn = chat.reply_many([ASKED] * 2, seeds=[1, 2], temperature=5.0, **options)
    assert drawn[0].ids != drawn[1].ids
    assert sizes == [3, 1, 1, 1, 1, 2]


def test_of_three_seeds_all_media_are_told_of(tiny_model: AnyToAny) -> None:
    steps: list[tuple[str, int, int]] = []
    replies = Chat(tiny_model).reply_many(
        [ASKED] * 3, seeds=[0, 1, 0], on_step=lambda *step: steps.append(step), **OPTIONS
    )
    assert [[medium.modality for medium in reply.media] for reply in replies] == [["image"]] * 3
    first, second, third = map(pixels, replies)
    assert (first == third).all()
    assert (first != second).any()
    assert len(steps) == 2  # one batch
