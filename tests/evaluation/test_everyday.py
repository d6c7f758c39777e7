"""Everyday requests: which replies are right, and what is left out where a judge is missing."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmllm import mini
from mmllm.conversation import MEDIA, Audio, Conversation, Image, Medium, Message, assistant, user
from mmllm.errors import AssetError
from mmllm.evaluation import everyday, runner
from mmllm.evaluation.clip_judge import MovingThing
from mmllm.evaluation.everyday import TASKS, is_right, needed_judges, read_requests
from mmllm.evaluation.everyday_judges import AudioJudge, ImageJudge, VideoJudge, load_judges
from mmllm.evaluation.measurement import ModelMeasurement
from mmllm.evaluation.prompts import EvalItem, EvalResponse, generate_responses
from mmllm.evaluation.resources import EvaluationResources
from mmllm.evaluation.scene_judge import OWN, Found
from mmllm.mini.world.clips import FRAMES
from mmllm.mini.world.rendering import SIDE
from mmllm.mini.world.sounds import RATE, SAMPLES, Soundscape, Voice
from tests.evaluation.scripted import ScriptedChat

REQUESTS = read_requests(mini.FOLDER / "data")


def medium(modality: str, caption: str) -> Medium:
    """A medium that the scripted judges read by its caption."""
    if modality == "audio":
        return Audio.from_numpy(np.zeros((1, 8), np.float32), 16_000, caption=caption)
    shape = (4, 4, 3) if modality == "image" else (2, 4, 4, 3)
    return MEDIA[modality](array=np.zeros(shape, np.uint8), caption=caption)


class CaptionJudge:
    """A medium shows a rule of which its caption names everything."""

    def shows(self, medium: Medium, rule: Mapping[str, Any]) -> bool:
        words = re.findall(r"[a-z][a-z-]+", str(rule.get("groups") or rule.get("sounds") or rule))
        keys = ("thing", "count", "colour", "size", "motion")
        return {word for word in words if word not in keys} <= self.names(medium)

    def names(self, medium: Medium) -> set[str]:
        return set((medium.caption or "").split())


JUDGES = dict.fromkeys(MEDIA, CaptionJudge())
CAT, DOG = medium("image", "cat"), medium("image", "dog")
MEOW = medium("audio", "cat")
CAT_IMAGE = {"image": {"groups": [{"thing": "cat"}], "layout": "alone"}}
CAT_SOUND = {"audio": {"sounds": ["cat"]}}
NEAREST = {"honest": {"about": "puma", "any": ["sorry"], "media": "nearest", "nearest": ["cat"]}}
NONE = {"honest": {"about": "puma", "any": ["sorry"], "media": "none"}}
TEXT = {"text": {"any": ["cat"], "none": ["dog"]}}


@pytest.mark.parametrize(
    ("expect", "words", "media", "right"),
    [
        (CAT_IMAGE, "", [CAT], True),
        (CAT_IMAGE, "A cat.", [DOG], False),
        (CAT_IMAGE, "A cat.", [], False),
        (CAT_IMAGE, "", [CAT, CAT], False),
        (CAT_IMAGE, "", [CAT, MEOW], False),
        (CAT_IMAGE, "", [MEOW], False),
        ({"all": [CAT_IMAGE, CAT_SOUND]}, "", [MEOW, CAT], True),
        ({"all": [CAT_IMAGE, CAT_SOUND]}, "", [CAT], False),
        ({"all": [CAT_IMAGE, CAT_SOUND]}, "", [CAT, DOG, MEOW], False),
        ({"all": [CAT_IMAGE, CAT_SOUND]}, "", [DOG, MEOW], False),
        ({"all": [CAT_IMAGE, TEXT]}, "A cat.", [CAT], True),
        ({"all": [CAT_IMAGE, TEXT]}, "A bird.", [CAT], False),
        ({"any": [NEAREST, CAT_IMAGE]}, "A cat.", [CAT], True),
        ({"any": [NEAREST, CAT_IMAGE]}, "A cat.", [DOG], False),
        (NEAREST, "Sorry, I know no puma.", [], True),
        (NEAREST, "Sorry, here is a cat.", [CAT], True),
        (NEAREST, "Sorry, it purrs.", [MEOW], True),
        (NEAREST, "Sorry, here is a dog.", [DOG], False),
        (NEAREST, "Sorry.", [medium("image", "")], False),
        (NEAREST, "Sorry.", [CAT, CAT], False),
        (NEAREST, "Here is a puma.", [CAT], False),
        (NONE, "Sorry.", [], True),
        (NONE, "Sorry.", [CAT], False),
        (TEXT, "It\u2019s a CAT.", [DOG], True),
        (TEXT | {"no_media": True}, "It is a cat.", [DOG], False),
        (TEXT | {"no_media": True}, "It is a cat.", [], True),
        (TEXT, "A cat or a dog.", [], False),
    ],
)
def test_which_replies_are_right(
    expect: dict[str, Any], words: str, media: list[Medium], right: bool
) -> None:
    assert is_right(expect, words, media, JUDGES) == right


def test_the_model_answers_every_turn_that_no_written_reply_follows() -> None:
    by_id = {item.id: item for items in REQUESTS.values() for item in items}
    follow_up = by_id["follow-up-19"]
    assert [[m.role for m in turn] for turn in follow_up.turns] == [["user"]] * 3
    memory = by_id["memory-07"]
    assert [[m.role for m in turn] for turn in memory.turns] == [["user", "assistant", "user"]]
    (image,) = memory.turns[0][1].media
    assert image.to_numpy().shape == (SIDE, SIDE, 3)
    assert {m.modality for i in REQUESTS["everyday/reading"] for m in i.turns[0][0].media} == {
        *("image", "audio", "video")
    }
    again = read_requests(mini.FOLDER / "data")["everyday/memory"][6]
    assert np.array_equal(again.turns[0][1].media[0].to_numpy(), image.to_numpy())


def answered(items: Sequence[EvalItem], script: Any) -> list[EvalResponse]:
    return generate_responses(ScriptedChat(script), items)


def test_metrics_of_each_kind_and_of_all() -> None:
    """A model that draws a cat whatever is asked."""
    requests = [item for task in TASKS for item in REQUESTS[task]]

    def draw_a_cat(conversation: Conversation) -> Message:
        return assistant("Here is a cat.", CAT)

    scored = everyday.score_requests(answered(requests, draw_a_cat), JUDGES)
    metrics = {m.name: m for m in everyday.request_metrics(scored, requests, time.perf_counter())}
    assert [*metrics] == [*TASKS, "everyday"]
    assert metrics["everyday"].n == 300
    assert metrics["everyday"].met is False
    plain = [item.id for item in REQUESTS["everyday/plain"] if "'cat'" in str(item.expect)]
    assert metrics["everyday/plain"].value == len(plain) / 20 > 0
    assert metrics["everyday/self"].value < 0.2
    assert scored[0].prediction == {
        "text": "Here is a cat.",
        "modalities": ["image"],
        "named": [["cat"]],
    }


def test_what_needs_a_missing_judge_is_left_out_whatever_the_reply_is() -> None:
    assert needed_judges({"all": [CAT_IMAGE, CAT_SOUND]}, []) == {"image", "audio"}
    assert needed_judges(NEAREST, [MEOW]) == {"audio"}
    assert needed_judges(TEXT, [CAT]) == set()
    requests = [*REQUESTS["everyday/sound"], *REQUESTS["everyday/polite"]]

    def say_nothing(conversation: Conversation) -> Message:
        return assistant("Hm.")

    judges = {"image": CaptionJudge()}
    scored = everyday.score_requests(answered(requests, say_nothing), judges)
    metrics = everyday.request_metrics(scored, requests, time.perf_counter())
    assert [(m.name, m.n, m.met) for m in metrics] == [("everyday/polite", 17, None)]
    assert metrics[0].threshold == "0.650 of 20"


def test_one_request_of_each_kind_is_measured_and_what_is_left_out_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chat = ScriptedChat(lambda _: assistant("Here is a cat.", CAT))
    chat.model = SimpleNamespace(decoders={})  # pyright: ignore[reportAttributeAccessIssue]
    measurement = ModelMeasurement(EvaluationResources(TASKS, 1), "scripted", chat)
    requests = measurement.resources.requests()
    assert [item.task for item in requests] == [*TASKS]
    counted: list[int] = []
    bar = SimpleNamespace(update=counted.append)
    measurement.measure_requests(requests, {"image": CaptionJudge()}, bar)
    assert sum(counted) == 15
    assert "2 of 15 requests left out: no judge of audio and video" in caplog.text
    names = [metric.name for metric in measurement.finished_metrics()]
    assert names == [
        *(t for t in TASKS if t not in ("everyday/sound", "everyday/clip")),
        "everyday",
    ]
    assert len(measurement.scored) == len(measurement.responses) == 13


class Finds:
    """Finds the same things in every image."""

    def __init__(self, *found: Found):
        self.found = found

    def find(self, images: np.ndarray) -> list[list[Found]]:
        assert images.shape[1:] == (SIDE, SIDE, 3)
        return [list(self.found) for _ in images]


def test_images_are_judged_by_what_is_found_in_them() -> None:
    cat, dog = Found("cat", "red", 32, 64, 56, 0.9), Found("dog", OWN, 96, 64, 56, 0.9)
    white = Image.from_numpy(np.full((64, 64, 3), 255, np.uint8))
    judge = ImageJudge(Finds(cat, dog))
    assert judge.names(white) == {"cat", "dog"}
    groups = [{"thing": "dog"}, {"thing": "cat", "colour": "red"}]
    assert judge.shows(white, {"groups": groups})
    assert judge.shows(white, {"groups": groups[::-1], "layout": "left", "ground": "white"})
    assert not judge.shows(white, {"groups": groups, "layout": "left"})
    assert not judge.shows(white, {"groups": groups, "ground": "black"})
    assert not judge.shows(white, {"groups": groups[:1]})
    assert not judge.shows(white, {"groups": [{"thing": "dog", "colour": "red"}, groups[1]]})
    assert judge.shows(white, {"without": ["spider"]})
    assert not judge.shows(white, {"without": ["dog"]})


@pytest.mark.parametrize(
    ("rule", "right"),
    [
        ({"thing": "cat", "motion": "up"}, True),
        ({"thing": "cat", "motion": "up", "colour": "red"}, True),
        ({"thing": "cat", "motion": "up", "colour": "blue"}, False),
        ({"thing": "cat", "motion": "down"}, False),
        ({"thing": "dog", "motion": "up"}, False),
    ],
)
def test_videos_are_judged_by_thing_motion_and_colour(rule: dict[str, Any], right: bool) -> None:
    class Judge:
        def find(self, clips: np.ndarray) -> list[list[MovingThing]]:
            assert clips.shape == (1, FRAMES, 4, 4, 3)
            return [[MovingThing("cat", "red", "up", 64, 64, 0.9)]]

    judge = VideoJudge(Judge())
    assert judge.shows(medium("video", ""), rule) == right
    assert judge.names(medium("video", "")) == {"cat"}


SOFT_CAT, TWICE = Soundscape((Voice("cat", "soft", "low"),)), Soundscape((Voice("cat", times=2),))
THEN = Soundscape((Voice("cat"), Voice("rain")), "then")
TOGETHER = Soundscape((Voice("cat"), Voice("rain")), "together")


@pytest.mark.parametrize(
    ("found", "rule", "right"),
    [
        (SOFT_CAT, {"sounds": ["cat"]}, True),
        (SOFT_CAT, {"sounds": ["cat"], "level": "soft", "pitch": "low"}, True),
        (SOFT_CAT, {"sounds": ["cat"], "level": "loud"}, False),
        (SOFT_CAT, {"sounds": ["cat"], "pitch": "high"}, False),
        (SOFT_CAT, {"sounds": ["cat"], "repeated": True}, False),
        (TWICE, {"sounds": ["cat"], "repeated": True}, True),
        (SOFT_CAT, {"sounds": ["rain"]}, False),
        (THEN, {"sounds": ["cat"]}, False),
        (THEN, {"sounds": ["cat", "rain"], "order": "sequence"}, True),
        (THEN, {"sounds": ["rain", "cat"], "order": "sequence"}, False),
        (THEN, {"sounds": ["cat", "rain"], "order": "together"}, False),
        (TOGETHER, {"sounds": ["rain", "cat"], "order": "together"}, True),
        (TOGETHER, {"sounds": ["rain", "cat"]}, True),
    ],
)
def test_audio_is_judged_by_sounds_order_and_how_they_are(
    found: Soundscape, rule: dict[str, Any], right: bool
) -> None:
    class Judge:
        def find(self, waves: np.ndarray) -> list[Soundscape]:
            assert waves.shape == (1, SAMPLES)
            return [found]

    judge = AudioJudge(Judge())
    for num in (8, SAMPLES + 8):
        sound = Audio.from_numpy(np.zeros((2, num), np.float32), RATE)
        assert judge.shows(sound, rule) == right
        assert judge.names(sound) == {voice.sound for voice in found.voices}


def test_without_weights_the_task_says_how_to_train_a_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssetError, match=r"python -m tools\.mini\.world\.judge"):
        load_judges(tmp_path)
    monkeypatch.setattr(runner, "load_judges", lambda: load_judges(tmp_path))
    monkeypatch.setattr(runner, "load", lambda *_: pytest.fail("the model is loaded first"))
    with pytest.raises(AssetError):
        runner.evaluate("mini", tasks=["everyday"])


def test_a_user_shows_media_before_the_words() -> None:
    first = REQUESTS["everyday/reading"][0].turns[0][0]
    assert first == user(*first.media, first.text)
