"""Keys of the prefix cache: equal keys mean that the model was shown the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mmllm import Audio, Image, Video
from mmllm.conversation import Medium, user
from mmllm.data.rendering import MediaSpan, Rendered
from mmllm.inference.chat import Chat
from mmllm.inference.prefix_cache import cache_keys
from mmllm.model import AnyToAny

FRAMES = np.zeros((3, 8, 8, 3), np.uint8)
TONE = np.sin(np.linspace(0, 40, 1600)).astype(np.float32)


def keys(medium: Medium) -> list:
    return cache_keys(Rendered(ids=[5, 9, 9, 7], inputs=[MediaSpan("some", medium, 1, 2)]))


def test_tokens_are_their_ids_and_placeholders_their_medium_and_offset() -> None:
    first, *placeholders, last = keys(Image.from_numpy(FRAMES[0]))
    assert (first, last) == (5, 7)
    assert [offset for _, offset in placeholders] == [0, 1]
    assert placeholders[0][0] == placeholders[1][0]


def test_equal_media_have_equal_keys_and_others_have_not() -> None:
    image = Image.from_numpy(FRAMES[0])
    assert keys(image) == keys(Image.from_numpy(FRAMES[0].copy()))
    assert keys(image) != keys(Image.from_numpy(FRAMES[0] + 1))
    assert keys(Video.from_numpy(FRAMES, 8.0)) != keys(Video.from_numpy(FRAMES, 4.0))


def test_videos_with_other_audio_tracks_have_other_keys() -> None:
    silent = Video.from_numpy(FRAMES, 8.0)
    tracks = [Audio.from_numpy(TONE, 16_000), Audio.from_numpy(-TONE, 16_000)]
    videos = [silent, *(Video.from_numpy(FRAMES, 8.0, audio=track) for track in tracks)]
    assert len({str(keys(video)) for video in videos}) == 3


@pytest.mark.parametrize(
    "find",
    [
        lambda model: next(model.encoders["image"].parameters()),
        lambda model: next(model.input_projections["image"].parameters()),
    ],
    ids=["encoder", "projection"],
)
def test_a_medium_is_read_again_by_other_weights(
    tiny_model: AnyToAny, find: Callable[[AnyToAny], torch.Tensor]
) -> None:
    """The text in front of it is not: no encoder has to do with that."""
    chat = Chat(tiny_model, prefixes=4)
    forbid: Any = dict.fromkeys(tiny_model.renderer.output_keys, "forbid")
    talk = [user("one two three four " * 8, Image.from_numpy(FRAMES[0] + 90), "what is this?")]
    other = [user("one two three four " * 8, Audio.from_numpy(TONE, 16_000), "what is this?")]

    def cached(talk: list) -> int:
        fresh = Chat(tiny_model).reply(talk, seed=0, max_new_tokens=3, modalities=forbid)
        reply = chat.reply(talk, seed=0, max_new_tokens=3, modalities=forbid)
        assert reply.text == fresh.text
        return reply.usage.cached

    prompt = tiny_model.renderer.render(talk, add_generation_prompt=True)
    cached(talk)
    cached(other)
    assert cached(talk) > prompt.inputs[0].start
    with torch.no_grad():
        find(tiny_model).mul_(-3)
    assert cached(talk) == prompt.inputs[0].start
    assert cached(talk) > prompt.inputs[0].start
    assert cached(other) > prompt.inputs[0].start
