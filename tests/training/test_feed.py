"""Which conversations of a global batch a process trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmllm import config
from mmllm import model as models
from mmllm.data.batch import Batch
from mmllm.data.mixture import Mixture
from mmllm.data.rendering import Rendered
from mmllm.features.cache import FeatureCache
from mmllm.training import feed as feeding
from mmllm.training.feed import TrainingStepDataset, open_sources
from mmllm.training.trainer import train

TALKS, BATCH, STEPS = 60, 48, 3
Talk = tuple[int, ...]
"""The ids of one conversation, which tell it from every other."""


@pytest.fixture
def make_feed(make_run, tmp_path: Path) -> Callable[..., TrainingStepDataset]:
    """`make_feed(rank, world, pack=True)`: talks of 1 to 40 words and, `too_long`, one of more
    than a batch may hold; two micro-batches a step."""
    model = models.build(make_run().system)

    def make(
        rank: int = 0, world: int = 1, *, too_long: bool = False, **changes
    ) -> TrainingStepDataset:
        words = np.random.default_rng(0).integers(1, 40, TALKS)
        words[0] = 900 if too_long else 1
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Talk {number}."},
                    {"role": "assistant", "content": " ".join(["hello"] * many)},
                ]
            }
            for number, many in enumerate(words)
        ]
        file = tmp_path / "talks.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        talks = config.parse_component(
            "data", {"type": "dialogues", "file": str(file)}, "data.talks"
        )
        stage = replace(make_run(batch_size=BATCH, **changes).stage, data={"talks": talks})
        mixture = Mixture(open_sources(stage.data, "data"), stage.seed)
        return TrainingStepDataset(
            model.renderer,
            model.batch_layout,
            mixture,
            FeatureCache(model),
            stage,
            rank=rank,
            world_size=world,
        )

    return make


def talks(batch: Batch) -> list[Talk]:
    """The conversations of a batch, in its order."""
    if batch.mask is not None:
        return [tuple(ids[own].tolist()) for ids, own in zip(batch.ids, batch.mask, strict=True)]
    prefix, *own = batch.ids[0].split([batch.prefix_len, *batch.seq_lens])
    return [(*prefix.tolist(), *ids.tolist()) for ids in own[: -1 if batch.padding else None]]


def shares(make_feed: Callable[..., TrainingStepDataset], world: int, step: int, **changes) -> list:
    """[micro][rank] -> the conversations of that process."""
    microbatches = [
        [talks(micro) for micro in make_feed(rank, world, **changes)[step].microbatches]
        for rank in range(world)
    ]
    return [list(ranks) for ranks in zip(*microbatches, strict=True)]


def excess(ranks: list[list[Talk]]) -> float:
    """How much longer the longest share is than the mean, as a fraction of the mean."""
    tokens = [sum(map(len, own)) for own in ranks]
    return max(tokens) / np.mean(tokens) - 1


@pytest.mark.parametrize("world", [2, 3])
def test_packs_are_balanced_by_length_and_hold_the_same_batch(make_feed, world: int) -> None:
    dealt, sliced = [], []
    for step in range(STEPS):
        whole = shares(make_feed, 1, step, pack=True)
        packed = shares(make_feed, world, step, pack=True)
        padded = shares(make_feed, world, step, pack=False)
        for (every,), ranks, slices in zip(whole, packed, padded, strict=True):
            assert len(set(every)) > BATCH // 4, "too few conversations differ for this test"
            assert sorted(talk for own in ranks for talk in own) == sorted(every)
            assert [len(own) for own in ranks] == [BATCH // 2 // world] * world
            dealt.append(excess(ranks))
            sliced.append(excess(slices))
    assert all(ours < other for ours, other in zip(dealt, sliced, strict=True))
    assert np.mean(dealt) < 0.2 * np.mean(sliced)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_unbalanced_batches_are_slices_in_the_global_order(
    make_feed, world: int, pack: bool
) -> None:
    """Where nothing is packed or there is one process; talks end before what closes a turn."""
    feed = make_feed()
    order = [tuple(feed.render(draw).ids) for draw in feed.mixture.batch(1, BATCH)]
    found = shares(make_feed, world, 1, pack=pack)
    flat = [talk for ranks in found for own in ranks for talk in own]
    matches = [whole[: len(talk)] == talk for whole, talk in zip(order, flat, strict=True)]
    assert all(matches) == (world == 1 or not pack)


@pytest.mark.parametrize(
    ("world", "changes", "expected"),
    [
        (1, {"pack": True}, BATCH),
        (2, {"pack": False}, BATCH // 2),
        (2, {"pack": True}, BATCH),
        (24, {"pack": True}, BATCH // 24),  # one conversation each: nothing to choose
    ],
)
def test_conversations_are_rendered_once(
    make_feed, monkeypatch: pytest.MonkeyPatch, world: int, changes: dict, expected: int
) -> None:
    feed = make_feed(0, world, **changes)
    render, rendered = feed.render, []
    monkeypatch.setattr(feed, "render", lambda draw: rendered.append(draw) or render(draw))
    feed[0]
    assert len(rendered) == len(set(rendered)) == expected


def test_lengths_are_balanced_within_groups_of_ranks(
    make_feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "BALANCED_RANKS", 2)
    found = shares(make_feed, 3, 0, pack=True)
    for ranks, slices in zip(found, shares(make_feed, 3, 0, pack=False), strict=True):
        assert sorted(ranks[0] + ranks[1]) == sorted(slices[0] + slices[1])
        assert ranks[0] != slices[0]
        assert ranks[2] == slices[2], "the last one is alone"


def test_unreadable_items_are_skipped_by_the_rank_that_has_them(
    make_feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "BALANCED_RANKS", 2)
    drawn, skipped = 0, []
    for step in range(STEPS):
        drawn += sum(draw.index == 0 for draw in make_feed().mixture.batch(step, BATCH))
        parts = [make_feed(rank, 4, too_long=True, pack=True)[step] for rank in range(4)]
        skipped += [name for part in parts for name, _ in part.skipped]
        lengths = [len(talks(micro)) for part in parts for micro in part.microbatches]
        assert lengths == [BATCH // 8] * 8
    assert skipped == ["talks/0"] * drawn
    assert drawn


def test_rows_that_steps_draw(make_feed):
    """Fewer draws than rows name theirs; as many or more name none."""
    feed = make_feed(steps=1)
    drawn = {draw.index for draw in feed.mixture.batch(0, BATCH)}
    assert feeding.drawn_rows(feed.mixture, feed.stage) == {"talks": sorted(drawn)}
    assert feeding.drawn_rows(feed.mixture, replace(feed.stage, steps=2)) is None
    rest = feeding.drawn_rows(feed.mixture, replace(feed.stage, steps=2), start=1)
    assert rest == {"talks": sorted({draw.index for draw in feed.mixture.batch(1, BATCH)})}
    grouped = replace(feed.stage, length_window=2, batch_size=12)  # draws of two steps are sorted
    both = {draw.index for step in range(2) for draw in feed.mixture.batch(step, 12)}
    assert feeding.drawn_rows(feed.mixture, grouped) == {"talks": sorted(both)}


def test_a_short_run_computes_the_features_of_what_it_draws(make_run, monkeypatch):
    computed: list[Rendered] = []
    real = FeatureCache.precompute

    def spy(self, items, **options):
        computed.extend(items := list(items))
        return real(self, items, **options)

    monkeypatch.setattr(FeatureCache, "precompute", spy)
    train(make_run(steps=1, batch_size=2, cache="memory"), progress=False)
    assert 1 <= len(computed) <= 2
    computed.clear()
    train(make_run(output="long", steps=12, batch_size=2, cache="memory"), progress=False)
    assert len(computed) == 24
