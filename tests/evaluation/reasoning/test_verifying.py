"""The rows of verified replies, of wordings and of System 2 Attention over media, with chats whose
results are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmllm import mini
from mmllm.conversation import Audio, Medium, Message, assistant
from mmllm.data.sources import read_text
from mmllm.evaluation.judges import Judge
from mmllm.evaluation.metrics import Metric
from mmllm.evaluation.reasoning import ROWS, wordings
from mmllm.evaluation.reasoning.verifying import encoder_judge
from mmllm.inference.replies import Reply
from mmllm.reasoning import Completion
from mmllm.reasoning.verified import verified_reply

DATA = mini.locate("data")
CONCEPTS = [row["id"] for row in json.loads(read_text(DATA / "sounds.json.gz"))["concepts"]]


def sound(concept: str) -> Audio:
    return Audio(source=DATA / "sounds" / concept / "1.ogg")


def concept_of(medium: Medium) -> str:
    return Path(str(medium.source)).parent.name


def one_hot(media: Sequence[Medium]) -> np.ndarray:
    """Features that know the concept of a medium from the name of its folder."""
    return np.eye(len(CONCEPTS))[[CONCEPTS.index(concept_of(medium)) for medium in media]]


JUDGE = Judge(one_hot, {concept: sound(concept) for concept in CONCEPTS})


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("verifying", "wordings"):
        name = f"mmllm.evaluation.reasoning.{module}.build_judge"
        monkeypatch.setattr(name, lambda *_, **__: JUDGE)


class SoundChat:
    """Makes the sound that `choose(text, seed)` names."""

    def __init__(self, choose):
        self.choose = choose
        encoder = SimpleNamespace(encode=lambda media: SimpleNamespace(tokens=tokens(media)))
        self.model = SimpleNamespace(encoders={"audio": encoder})

    def reply(self, messages: Sequence[Message], *, seed: int, **options: Any) -> Reply:
        options.pop("max_new_tokens")
        options = {"verify": None, **options}

        def answer(messages: Sequence[Message], seed: int) -> Reply:
            made = sound(self.choose(messages[-1].text, seed))
            return Reply(assistant("Here it is. ", made), seed, [])

        def write(messages: Sequence[Message], seed: int) -> Reply:
            seen = concept_of(messages[-1].media[0]) if messages[-1].media else "a sound"
            return Reply(assistant(f"It is {seen}."), seed, [])

        return verified_reply(answer, write, messages, seed=seed, **options)

    def reply_many(self, conversations, *, seeds, **_) -> list[Reply]:
        return [
            Reply(assistant(sound(self.choose(messages[-1].text, seed))), seed, [])
            for messages, seed in zip(conversations, seeds, strict=True)
        ]


def tokens(media: Sequence[Medium]) -> torch.Tensor:
    return torch.tensor(one_hot(media), dtype=torch.float32)[:, None]


def measured(row: str, chat: Any, num: int) -> dict[str, Metric]:
    done: list[int] = []
    metrics = list(ROWS[row][0](chat, DATA, num, done.append))
    assert sum(done) >= num
    return {metric.name.removeprefix(f"{row}, "): metric for metric in metrics}


def named(text: str) -> str:
    """The concept that a request names."""
    words = text.lower().replace("-", " ")
    found = [concept for concept in CONCEPTS if concept.replace("-", " ") in words]
    return max(found, key=len)


def test_an_encoder_ranks_sounds_by_its_own_features() -> None:
    chat: Any = SoundChat(lambda *_: "piano")
    ears = encoder_judge(chat, JUDGE.gallery)
    assert [ranked[0] for ranked in ears.rank([sound("cow"), sound("piano")])] == ["cow", "piano"]


def test_the_gain_of_verified_replies_is_that_over_the_first_one() -> None:
    """The right sound comes with every second seed."""

    def choose(text: str, seed: int) -> str:
        return named(text) if seed % 2 else "piano"

    found = measured("reasoning/verify", SoundChat(choose), 20)
    first = found["first reply"]
    assert 0 < first.value < 1
    assert found["best of 4 by the encoder"].value == 1
    assert found["accepted by the encoder"].value == 1
    assert found["best of 4 - first"].value == pytest.approx(1 - first.value)
    assert found["best of 4 - first"].met
    assert found["think first"].value == first.value
    assert found["best of 4 by look-again"].value >= first.value


def test_a_judge_that_never_accepts_gains_nothing() -> None:
    found = measured("reasoning/verify", SoundChat(lambda *_: "piano"), 10)
    assert found["best of 4 - first"].value == 0
    assert not found["best of 4 - first"].met


def test_the_wording_that_works_is_found_and_measured_on_other_sounds() -> None:
    def choose(text: str, seed: int) -> str:
        return named(text) if "imitate" in text.lower() and "please" in text.lower() else "piano"

    found = measured("reasoning/wording", SoundChat(choose), 600)
    (gain,) = [metric for name, metric in found.items() if name.startswith("gain of 'Please imit")]
    assert gain.n == len(CONCEPTS) // 2 * wordings.SEEDS
    assert gain.value > 0.9
    assert gain.met


class Listening:
    """Names the sound if there is nothing else; its reply is less likely without the sound."""

    def complete(self, conversation: Sequence[Message], **_: Any) -> list[Completion]:
        media = conversation[-1].media
        alone = len(media) == 1 and media[0].modality == "audio"
        named = concept_of(media[0]).replace("-", " ") if alone else "nothing"
        return [Completion(f"This is {named}.")]

    def score(self, conversation: Sequence[Message], replies: Sequence[str]) -> list[float]:
        hears = any(medium.modality == "audio" for medium in conversation[-1].media)
        return [0.0 if hears else -9.0 for _ in replies]


def test_what_is_kept_of_several_media_is_counted() -> None:
    found = measured("reasoning/focus", Listening(), 12)
    assert found["the sound alone was kept"].value == found["the sound was kept"].value == 1
    assert found["named from all media"].value == 0
    right = found["named from the media that were kept"].value
    assert right == found["named from the sound alone"].value > 0.9
    assert found["named: focused - all media"].value == right
