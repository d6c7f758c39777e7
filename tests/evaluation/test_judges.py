"""Judges find real items that were altered, and motion is measured as it is defined."""

import numpy as np
import pytest

from mmllm.conversation import Audio, Image, Video
from mmllm.evaluation.judges import Judge, altered_items, audio_statistics, build_judge, motion


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_judges_find_real_altered_items(modality: str) -> None:
    judge = build_judge(modality, num=16)
    altered = altered_items(modality, judge, num=16)
    validation = judge.validate(altered)
    assert validation.n == (32 if modality == "audio" else 16)
    assert validation.top5 >= 0.9
    ranked = judge.rank([medium for _, medium in altered])
    assert all(sorted(row) == sorted(judge.concepts) for row in ranked)
    assert validation.top1 == np.mean(
        [row[0] == concept for (concept, _), row in zip(altered, ranked, strict=True)]
    )


def test_ranks_are_those_of_the_largest_dot_products() -> None:
    def brightness(media):
        mean = np.array([medium.to_numpy().mean() / 255 for medium in media])
        return np.stack([np.cos(mean), np.sin(mean)], axis=1)

    def grey(level: int) -> Image:
        return Image.from_numpy(np.full((4, 4, 3), level, np.uint8))

    judge = Judge(brightness, {"black": grey(0), "grey": grey(120), "white": grey(255)})
    assert judge.rank([grey(100), grey(250)]) == [
        ["grey", "black", "white"],
        ["white", "grey", "black"],
    ]
    assert judge.rank([]) == []
    validation = judge.validate([("black", grey(5)), ("white", grey(110))])
    assert (validation.n, validation.top1, validation.top5) == (2, 0.5, 1.0)


def test_motion_is_the_mean_difference_of_neighbouring_frames() -> None:
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1] = 51  # a fifth
    frames[2] = 255
    slow_way = (51 / 255 + 204 / 255) / 2
    assert motion(Video.from_numpy(frames, 8.0)) == pytest.approx(slow_way)
    assert motion(Video.from_numpy(frames[:1], 8.0)) == 0


def test_audio_statistics_ignore_loudness() -> None:
    time = np.arange(32_000) / 16_000
    wave = (np.sin(2 * np.pi * 440 * time) * np.exp(-3 * time)).astype(np.float32)
    loud, soft = (audio_statistics(Audio.from_numpy(g * wave, 16_000)) for g in (1.0, 0.25))
    np.testing.assert_allclose(loud, soft, atol=1e-3)
    silent = audio_statistics(Audio.from_numpy(np.zeros(100, np.float32), 16_000))
    assert np.isfinite(silent).all()
    assert silent.shape == loud.shape
