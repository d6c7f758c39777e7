"""What trees are built over: how texts, clips and sounds are cut, and walks over the latter."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from mmllm.errors import ConfigError
from mmllm.reasoning import LongMedium, ScriptedModel, TreeOptions, build_tree, walk
from mmllm.reasoning.reading import answer_by_baselines, lexical_segment, likeliest_segments
from mmllm.reasoning.sources import as_source, split_text
from mmllm.reasoning.tree import load_tree
from tests.reasoning.readers import CLIP, NUM, SOUND, TEXT, perceiving

LONG = {"video": LongMedium(CLIP, 1.0), "audio": LongMedium(SOUND, 1.0)}
OPTIONS = TreeOptions(num_children=3, summary_tokens=8)


@pytest.mark.parametrize("num_tokens", [16, 23, 40, 100, 10_000])
@pytest.mark.parametrize("text", [TEXT, "word " * 300, "One two three. " * 50, "x" * 500, "a\n\nb"])
def test_segments_of_a_text_cover_it_within_their_limit(text: str, num_tokens: int) -> None:
    bounds = list(split_text(ScriptedModel(lambda *_: ""), text, num_tokens))
    assert bounds[0][0] == 0
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))
    assert not text[bounds[-1][1] :].strip()
    assert all(len(text[start:end].split()) <= num_tokens for start, end in bounds)


@pytest.mark.parametrize(("seconds", "num"), [(1.0, 9), (4.0, 2), (2.0, 4), (0.25, 36), (100.0, 1)])
def test_segments_of_a_clip_are_equal_parts(seconds: float, num: int) -> None:
    source = LongMedium(CLIP, seconds)
    bounds = list(source.segments(perceiving(), 500))
    assert len(bounds) == num
    shown = [source.message(*entry).media[0].to_numpy() for entry in bounds]
    assert np.array_equal(np.concatenate(shown), CLIP.to_numpy())
    assert max(map(len, shown)) - min(map(len, shown)) <= 1


@pytest.mark.parametrize("modality", LONG)
@pytest.mark.parametrize("number", [0, 4, 8])
def test_a_walk_finds_when_a_thing_is_there(modality: str, number: int) -> None:
    model = perceiving()
    tree = build_tree(model, LONG[modality], OPTIONS)
    assert tree.nodes[9].summary == "thing0 thing1 thing2"  # listed, not summarised
    question = f"When is the thing{number} there?"
    found = walk(model, tree, question, memory_tokens=0)
    assert found.segments == [number]
    assert found.path == [tree.root, 9 + number // 3, number]
    assert tree.place_of(number) == f"{number}.0 s to {number + 1}.0 s"
    assert (found.answer, found.read_fraction) == (f"thing{number}", pytest.approx(1 / 9))
    assert lexical_segment(tree, question) == number
    assert likeliest_segments(model, tree, [question, "When is the thing1 there?"]) == [number, 1]


@pytest.mark.parametrize("modality", LONG)
def test_baselines_of_a_clip_look_at_the_whole_or_at_descriptions(modality: str) -> None:
    model = perceiving()
    tree = build_tree(model, LONG[modality], OPTIONS)
    found = answer_by_baselines(model, tree, "When is the thing2 there?")
    assert found == {
        "whole": "thing4",
        "truncated": None,
        "flat": "thing0",
        "lexical": "thing2",
        "likelihood": "thing2",
    }


def test_a_tree_of_another_clip_or_of_other_segments_is_refused(tmp_path: Path) -> None:
    model = perceiving()
    build_tree(model, LONG["video"], OPTIONS, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    assert load_tree(path, model, LONG["video"]).segments == list(range(NUM))
    with pytest.raises(ConfigError, match="another video"):
        load_tree(path, model, LongMedium(CLIP, 2.0))
    with pytest.raises(ConfigError, match="no tree can be read from it"):
        load_tree(path, model, TEXT)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a text, a Video or an Audio to read, got 7"):
        as_source(7)  # pyright: ignore
    with pytest.raises(ConfigError, match="seconds: expected more than 0, got 0"):
        LongMedium(CLIP, 0)
