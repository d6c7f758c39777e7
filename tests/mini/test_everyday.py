"""The everyday requests: each can be asked, its media can be made, and its rule judges as meant."""

from __future__ import annotations

import functools
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from mmllm import mini
from mmllm.evaluation.everyday import KINDS, MEDIA_RULES, NUM_OF_A_KIND, scene_of, words_are_right
from mmllm.mini.world.clips import FRAMES, Clip, render_clip
from mmllm.mini.world.rendering import SIDE, render
from mmllm.mini.world.scenes import MOST, Group, Scene, combinations, is_heldout
from mmllm.mini.world.things import things

DATA = mini.FOLDER / "data"
GROUPS_OF_LAYOUT = {"alone": 1, "left": 2, "above": 2, "pair": 2, "row": 3, "over": 3, "corners": 4}

Request = dict[str, Any]
REQUESTS: list[Request] = [
    json.loads(line) for line in (DATA / "everyday.jsonl").read_text("utf-8").splitlines()
]
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def sound_ids() -> set[str]:
    with gzip.open(DATA / "sounds.json.gz", "rt", encoding="utf-8") as file:
        return {concept["id"] for concept in json.load(file)["concepts"]}


def of_kind(kind: str) -> list[Request]:
    return [row for row in REQUESTS if row["kind"] == kind]


def rules(expect: Request) -> Iterator[tuple[str, Any]]:
    """Every (name, rule) of an expectation, those inside "all" and "any" too."""
    for name, rule in expect.items():
        if name in ("all", "any"):
            assert len(rule) > 1
            for part in rule:
                yield from rules(part)
        elif name == "no_media":
            assert rule is True
            assert not set(expect) & set(MEDIA_RULES)
        else:
            yield name, rule


def media_of(request: Request) -> Iterator[tuple[str, Any]]:
    """The (modality, description) of each medium in the turns."""
    for turn in request["turns"]:
        for medium in turn.get("media", ()):
            yield from medium.items()


def test_three_hundred_requests_twenty_of_each_kind() -> None:
    assert Counter(row["kind"] for row in REQUESTS) == dict.fromkeys(KINDS, NUM_OF_A_KIND)
    ids = [row["id"] for row in REQUESTS]
    assert ids == [f"{kind}-{number:02d}" for kind in KINDS for number in range(1, 21)]


def test_no_text_occurs_twice() -> None:
    texts = Counter(
        re.sub(r"[\W_]+", " ", turn["user"].lower()).strip() or turn["user"]
        for row in REQUESTS
        for turn in row["turns"]
        if "user" in turn
    )
    assert [text for text, times in texts.items() if times > 1] == []


@each_kind
def test_fields_are_those_that_the_readme_names(kind: str) -> None:
    known = {
        "image": {"groups", "layout", "ground", "without"},
        "audio": {"sounds", "order", "level", "pitch", "repeated"},
        "video": {"thing", "motion", "colour"},
        "text": {"any", "none"},
        "honest": {"about", "any", "media", "nearest"},
    }
    for row in of_kind(kind):
        assert {"id", "kind", "turns", "expect"} <= set(row), row["id"]
        assert set(row) <= {"id", "kind", "turns", "expect", "right", "wrong"}, row["id"]
        for turn in row["turns"]:
            assert set(turn) - {"media"} in ({"user"}, {"assistant"}), row["id"]
        assert "user" in row["turns"][-1], row["id"]
        assert all(set(rule) <= known[name] for name, rule in rules(row["expect"])), row["id"]


@each_kind
def test_pictures_can_be_rendered_and_combine_what_training_never_sees(kind: str) -> None:
    for row in of_kind(kind):
        for name, description in (*media_of(row), *rules(row["expect"])):
            if name != "image":
                continue
            if "groups" not in description:
                assert set(description["without"]) < set(things()), row["id"]
                continue
            scene = scene_of(description)
            assert len(scene.groups) == GROUPS_OF_LAYOUT[scene.layout], row["id"]
            assert sum(group.count for group in scene.groups) <= MOST, row["id"]
            for group in scene.groups:
                assert group.count == 1 or things()[group.thing].countable, row["id"]
                assert group.colour is None or group.colour != scene.ground, row["id"]
            assert render(scene, random.Random(0)).shape == (SIDE, SIDE, 3)
            heldout = [is_heldout(combination) for combination in combinations(scene)]
            assert any(heldout) if len(scene.groups) > 2 else all(heldout), row["id"]


@each_kind
def test_sounds_and_clips_are_of_the_world(kind: str) -> None:
    free = {
        "order": (None, "together", "sequence"),
        "level": (None, "loud", "soft"),
        "pitch": (None, "high", "low"),
        "repeated": (None, True),
    }
    for row in of_kind(kind):
        for name, description in (*media_of(row), *rules(row["expect"])):
            if name == "audio":
                asked = {"sounds": [description]} if isinstance(description, str) else description
                assert set(asked["sounds"]) <= sound_ids(), row["id"]
                assert len(asked["sounds"]) == (2 if "order" in asked else 1), row["id"]
                assert all(asked.get(key) in values for key, values in free.items()), row["id"]
            elif name == "video":
                group = Group(description["thing"], colour=description.get("colour"))
                clip = Clip(Scene((group,)), (description["motion"],))
                assert len(render_clip(clip, random.Random(0))) == FRAMES
                moves = ("motion", description["motion"], group.thing)
                heldout = map(is_heldout, (*combinations(clip.scene), moves))
                assert all(heldout), row["id"]


@each_kind
def test_text_rules_accept_right_replies_and_reject_wrong_ones(kind: str) -> None:
    """Every rule for words comes with three right replies and two wrong ones."""
    for row in of_kind(kind):
        expect = row["expect"]
        judged = [rule for name, rule in rules(expect) if name in ("text", "honest")]
        right, wrong = row.get("right", []), row.get("wrong", [])
        assert (len(right), len(wrong)) == ((3, 2) if judged else (0, 0)), row["id"]
        assert [reply for reply in right if not words_are_right(expect, reply)] == [], row["id"]
        assert [reply for reply in wrong if words_are_right(expect, reply)] == [], row["id"]


@each_kind
def test_nearest_things_are_of_the_world(kind: str) -> None:
    for row in of_kind(kind):
        for name, rule in rules(row["expect"]):
            if name == "honest":
                nearest = rule.get("nearest", [])
                assert rule["media"] == ("nearest" if nearest else "none"), row["id"]
                assert set(nearest) <= {*things(), *sound_ids()}, row["id"]
