"""Keys of the prefix cache: equal keys mean that the model was shown the same."""

from __future__ import annotations

import numpy as np

from mmllm import Audio, Image, Video
from mmllm.conversation import Medium
from mmllm.data.rendering import MediaSpan, Rendered
from mmllm.inference.prefix_cache import cache_keys

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
