"""Directions added to states while a model replies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmllm import insight
from mmllm.conversation import user
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.insight import Direction, heads
from mmllm.insight.steering import reply_states
from mmllm.model import AnyToAny

APPLE, VIOLIN = [user("Draw a red apple")], [user("a violin, please one two three")]
FORCED: Any = {"image": "force", "audio": "forbid", "video": "forbid"}


@pytest.fixture
def chat(tiny_model: AnyToAny) -> Chat:
    return Chat(tiny_model)


def picture_of(chat: Chat, conversation: Any) -> np.ndarray:
    reply = chat.reply(conversation, seed=0, temperature=0.0, max_new_tokens=40, modalities=FORCED)
    assert reply.image is not None
    return reply.image.to_numpy().astype(int)


def test_a_difference_at_the_last_layer_draws_what_the_other_request_draws(chat: Chat) -> None:
    """At one unit the steered states are those of the other reply, and so is the picture."""
    states = reply_states(chat, "layers.1", [APPLE, VIOLIN], media="image")
    assert [tuple(part.shape) for part in states] == [(4, 32), (4, 32)]
    direction = insight.difference(chat, "layers.1", [APPLE], [VIOLIN], media="image")
    torch.testing.assert_close(direction.vector, states[0] - states[1])
    with insight.look(chat, "output_projections.image") as wanted:
        apple = picture_of(chat, APPLE)
    with insight.look(chat, "output_projections.image") as plain:
        violin = picture_of(chat, VIOLIN)
    with insight.steer(chat, direction), insight.look(chat, "output_projections.image") as seen:
        steered = picture_of(chat, VIOLIN)
    name = "output_projections.image"
    assert not wanted[name].allclose(plain[name], atol=1e-4)
    torch.testing.assert_close(seen[name], wanted[name], atol=1e-4, rtol=1e-3)
    assert np.abs(steered - apple).max() <= 1
    assert (picture_of(chat, VIOLIN) == violin).all()  # nothing is left


def test_strength_and_positions_say_what_is_added_and_where(chat: Chat) -> None:
    vector = torch.randn(32)
    conversation = [user("hello")]
    options: dict[str, Any] = {"seed": 0, "max_new_tokens": 3, "modalities": FORCED}

    def states() -> tuple[torch.Tensor, np.ndarray]:
        with insight.look(chat, "layers.0") as seen:
            chat.reply(conversation, **options)
        return seen["layers.0"], seen.positions.select("signal")

    plain, is_signal = states()
    direction = Direction("layers.0", vector)
    with insight.steer(chat, [direction, direction], strength=1.5, positions="signal"):
        steered, _ = states()
    change = steered - plain
    torch.testing.assert_close(change[is_signal], (3 * vector).expand(4, -1), atol=1e-4, rtol=1e-4)
    assert change[~is_signal].abs().max() < 1e-4
    other = direction.random(3)
    assert other.vector.norm().item() == pytest.approx(vector.norm().item(), rel=1e-5)
    assert not other.vector.allclose(vector)


def test_the_cost_of_a_direction_is_the_rise_of_perplexity(chat: Chat) -> None:
    ids = heads.repeated_tokens(chat, 2, length=8)
    direction = Direction("layers.0", 10 * torch.randn(32))
    assert insight.perplexity_rise(chat, direction, ids, strength=0) == pytest.approx(1, abs=1e-4)
    with insight.edit(chat, "layers.0", lambda states, _: states + direction.vector):
        expected = heads.token_losses(chat, ids).mean()
    expected = (expected - heads.token_losses(chat, ids).mean()).exp()
    assert insight.perplexity_rise(chat, direction, ids) == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("vector", "positions", "message"),
    [
        (torch.zeros(32), "signals", "expected one of all, text, media, signal, image"),
        (torch.zeros(31), "all", r"a vector of 32 numbers.*\[31\]"),
        (torch.zeros(4, 32), "all", "average it"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(
    chat: Chat, vector: torch.Tensor, positions: str, message: str
) -> None:
    with (
        pytest.raises(ConfigError, match=message),
        insight.steer(chat, Direction("layers.0", vector), positions=positions),
    ):
        pass


def test_equal_conversations_and_unknown_sites_are_refused(chat: Chat) -> None:
    with pytest.raises(ConfigError, match="have to differ"):
        reply_states(chat, "layers.0", [APPLE, APPLE], media="image")
    with pytest.raises(ConfigError, match=r"did you mean 'layers\.0'"):
        reply_states(chat, "layer.0", [APPLE], media="image")
