"""Anomalies on small convolutional encoders, against distances computed the slow way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmllm.conversation import Audio, Text, Video
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.insight import AnomalyDetector, look
from mmllm.insight.anomaly import middle_stages, odds_of_no, question, surprisal_of
from mmllm.model import AnyToAny
from tests.insight.conv_encoder import SIDE, ConvEncoder, pictures, with_a_spot


@pytest.fixture
def chat(tiny_model: AnyToAny) -> Chat:
    for modality in ("image", "audio", "video"):
        tiny_model.encoders[modality] = ConvEncoder(modality)
    return Chat(tiny_model)


def test_a_spot_is_found_and_where_it_is(chat: Chat) -> None:
    detector = AnomalyDetector(chat, pictures(9))
    assert detector.stages == ("blocks.1", "blocks.2")
    fresh = pictures(6, seed=1)
    usual = detector.score(fresh)
    odd = detector.score([with_a_spot(picture) for picture in fresh])
    assert min(entry.score for entry in odd) > max(entry.score for entry in usual)
    assert all(entry.p_value == pytest.approx(0.1) for entry in odd), "1 / (9 + 1)"
    assert np.mean([entry.p_value for entry in usual]) > 0.2
    for entry in odd:
        assert entry.map.shape == (SIDE, SIDE)
        y, x = divmod(int(entry.map.argmax()), SIDE)
        assert 7 <= y <= 15
        assert 0 <= x <= 8


def test_distances_are_those_to_the_nearest_normal_cell(chat: Chat) -> None:
    normal, asked = pictures(4), with_a_spot(pictures(1, seed=3)[0])
    (found,) = AnomalyDetector(chat, normal, stages=["blocks.3"]).score([asked])
    with look(chat, "encoders.image.blocks.3") as seen:
        encoder: Any = chat.model.encoders["image"]
        encoder.encode([*normal, asked])
    states = seen["encoders.image.blocks.3"].float()
    scale = states[:4].norm(dim=1).mean() + 1e-6
    cells = F.avg_pool2d(states, 3, 1, 1).permute(0, 2, 3, 1) / scale
    wanted = torch.zeros(SIDE, SIDE)
    for y in range(SIDE):
        for x in range(SIDE):
            wanted[y, x] = (cells[:4] - cells[4, y, x]).square().sum(-1).sqrt().min()
    torch.testing.assert_close(found.map, wanted, atol=1e-3, rtol=1e-3)
    largest = wanted.flatten().sort(descending=True).values[:5]
    assert found.score == pytest.approx(largest.mean().item(), abs=1e-3)


def test_the_order_of_frames_counts(chat: Chat) -> None:
    draw = np.random.default_rng(0)
    frames = np.stack([np.full((SIDE, SIDE, 3), shade) for shade in (20, 100, 180)])

    def clip(order: list[int]) -> Video:
        noisy = frames[order] + draw.integers(0, 8, frames.shape)
        return Video.from_numpy(noisy.astype(np.uint8), 3.0)

    detector = AnomalyDetector(chat, [clip([0, 1, 2]) for _ in range(5)])
    usual, backwards, still = detector.score([clip([0, 1, 2]), clip([2, 1, 0]), clip([0, 0, 0])])
    assert usual.score < min(backwards.score, still.score) / 2
    assert backwards.map.shape == (3, SIDE, SIDE)
    by_frame = backwards.map.mean((1, 2))
    assert by_frame[1] < by_frame[0]
    assert by_frame[1] < by_frame[2]


def test_a_click_is_found_in_a_sound(chat: Chat) -> None:
    draw = np.random.default_rng(0)

    def sound(click: bool) -> Audio:
        wave = draw.normal(0, 0.05, (1, SIDE * 64)).astype(np.float32)
        if click:
            wave[0, 640:700] += 0.9
        return Audio.from_numpy(wave, 8_000)

    detector = AnomalyDetector(chat, [sound(click=False) for _ in range(8)])
    usual, odd = detector.score([sound(click=False), sound(click=True)])
    assert odd.score > 2 * usual.score
    assert odd.map.shape == (SIDE, 8)
    assert 8 <= int(odd.map.amax(1).argmax()) <= 12, "the time of the click"


def test_descriptions_and_questions_are_scored_by_the_model(chat: Chat, tiny_model: Any) -> None:
    other = Chat(tiny_model)
    text, scores = "a red apple", []
    other.score = lambda talk, replies: scores.append((talk, replies)) or [-3.0, -1.0]  # pyright: ignore
    picture = pictures(1)[0]
    assert surprisal_of(other, picture, text) == 3.0
    detector = AnomalyDetector(other, pictures(3), describe=text)
    assert detector.score([picture])[0].surprisal == 3.0
    assert next(part for message in scores[0][0] for part in message.parts) is picture
    asked = question(picture, name="an apple", standard="It is red.", reference=pictures(2)[1])
    assert asked.parts[3] is picture
    assert [part.text for part in asked.parts if isinstance(part, Text)] == [
        "This one is normal: ",
        "What is normal: It is red. ",
        "Is this an apple? Answer yes or no.",
    ]
    assert odds_of_no(other, asked) == 2.0
    assert scores[-1][1] == ["Yes.", "No."]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda chat: AnomalyDetector(chat, pictures(1)), "two or more normal media"),
        (lambda chat: AnomalyDetector(chat, []), "got 0 of none"),
        (
            lambda chat: AnomalyDetector(chat, [*pictures(2), Video.from_numpy(_clip(), 3.0)]),
            "of one modality, got 3 of image, video",
        ),
        (
            lambda chat: AnomalyDetector(chat, pictures(2), stages=["block.1"]),
            r"encoders\.image\.block\.1.*did you mean",
        ),
        (
            lambda chat: AnomalyDetector(chat, pictures(2)).score([Video.from_numpy(_clip(), 3.0)]),
            "expected image, got video",
        ),
        (lambda chat: middle_stages(nn.Linear(2, 2)), "Linear has no chain of layers"),
    ],
)
def test_wrong_use_is_refused(chat: Chat, make: Callable[[Chat], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(chat)


def _clip() -> np.ndarray:
    return np.zeros((3, SIDE, SIDE, 3), np.uint8)
