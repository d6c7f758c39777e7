"""Rows of composing: with a model that knows all answers, and one that knows none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmllm.conversation import Audio, Image, Medium, Message, Video, assistant
from mmllm.evaluation import composing
from mmllm.evaluation.composing import Described, heldout_item, is_right, words_of
from mmllm.mini.world.clips import Clip
from mmllm.mini.world.clips import is_training as is_training_clip
from mmllm.mini.world.scenes import Group, Scene, is_training
from mmllm.mini.world.sounds import Soundscape, Voice
from mmllm.mini.world.sounds import is_training as is_training_soundscape
from mmllm.mini.world.talk import Talk

MEDIA = {Scene: Image, Clip: Video, Soundscape: Audio}


class ByCaption:
    """A judge that reads the caption of a medium."""

    def is_of(self, medium: Medium, described: Described) -> bool:
        return medium.caption == words_of(described)


class Model:
    """Stands for a chat: answers as the data do, or always the same."""

    def __init__(self, knows: bool):
        self.knows = knows
        self.answers: dict[int, tuple[Message, Message]] = {}
        decoders = {
            key: SimpleNamespace(encode_captions=list, sample=self._sample(key))
            for key in ("image", "audio", "video")
        }
        self.model = SimpleNamespace(
            decoders=decoders, renderer=SimpleNamespace(output_keys={key: key for key in decoders})
        )

    def _sample(self, key: str) -> Any:
        kind = {"image": Image, "audio": Audio, "video": Video}[key]
        return lambda captions, generators: [
            kind(caption=text if self.knows else "a cat") for text in captions
        ]

    def record(self, messages: Sequence[Message]) -> None:
        self.answers[id(messages[-2])] = messages[-2], messages[-1]

    def reply_many(self, conversations: Sequence[Sequence[Message]], **_: Any) -> list[Any]:
        if not self.knows:
            return [
                SimpleNamespace(message=assistant("Hm.", Image(caption="a cat")))
                for _ in conversations
            ]
        return [SimpleNamespace(message=self.answers[id(talk[-1])][1]) for talk in conversations]


@pytest.fixture(params=[True, False], ids=["knows", "knows nothing"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model(request.param)
    answer, ask = Talk.answer, composing.request_for

    def answer_and_record(self: Talk, *parts: Any) -> None:
        answer(self, *parts)
        model.record(self.messages)

    def ask_and_record(described: Described, rng: random.Random) -> Message:
        message = ask(described, rng)
        words = words_of(described)
        model.record(
            [message, assistant(f"Here is {words}.", MEDIA[type(described)](caption=words))]
        )
        return message

    monkeypatch.setattr(Talk, "answer", answer_and_record)
    monkeypatch.setattr(composing, "request_for", ask_and_record)
    monkeypatch.setattr(
        composing, "judges", lambda: dict.fromkeys(("image", "audio", "video"), ByCaption())
    )
    return model


@pytest.mark.parametrize("row", composing.ROWS)
def test_a_row_tells_who_knows_from_who_does_not(row: str, model: Model) -> None:
    measure, _ = composing.ROWS[row]
    done: list[int] = []
    metrics = {metric.name: metric for metric in measure(model, Path(), 12, done.append)}
    assert all(name.startswith("composing/") for name in metrics)
    assert sum(done) >= 12
    for name, metric in metrics.items():
        if name == "composing/known, refused":
            assert metric.value == 0.0
        elif model.knows:
            assert metric.value == 1.0, metric
            assert metric.met in (True, None)
        else:
            assert metric.value <= 0.1, metric
            assert metric.met in (False, None)


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_what_is_asked_for_is_in_no_training(modality: str) -> None:
    rng = random.Random(0)
    for _ in range(40):
        item = heldout_item(modality, ("pair", "colour", "four"), rng)
        if isinstance(item, Scene):
            assert not is_training(item)
            assert not (len(item.groups) == 2 and item.layout == "pair")
        elif isinstance(item, Clip):
            assert not is_training_clip(item)
        else:
            assert not is_training_soundscape(item)


def test_a_reply_is_right_with_one_medium_of_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composing, "judges", lambda: {"image": ByCaption(), "audio": ByCaption()})
    cat = Scene((Group("cat"),))
    image = Image(caption="a cat")
    assert is_right(assistant("Here it is.", image), cat)
    assert not is_right(assistant("Here it is."), cat)
    assert not is_right(assistant(image, image), cat)
    assert not is_right(assistant(image), Soundscape((Voice("cat"),)))
    assert is_right(assistant(Audio(caption="a cat")), Soundscape((Voice("cat"),)))


def test_a_row_names_the_judges_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composing, "judges", lambda: {"image": ByCaption()})
    lacking = {
        name: missing for name in composing.ROWS if (missing := composing.missing_judges(name))
    }
    assert lacking == {
        "composing/clip": ["video"],
        "composing/sound": ["audio"],
        "composing/turns": ["audio", "video"],
    }
