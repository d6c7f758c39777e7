"""The row of verified replies: sounds that a first judge chose, measured by a second one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import Medium
from mmllm.evaluation.judges import Judge, build_judge
from mmllm.evaluation.metrics import Metric, accuracy_metric, difference_metric, with_gain
from mmllm.evaluation.prompts import (
    MAX_NEW_TOKENS,
    EvalItem,
    evenly_spaced,
    read_test_items,
)
from mmllm.evaluation.reasoning.searching import OnProgress
from mmllm.inference.chat import Chat
from mmllm.inference.replies import Reply
from mmllm.reasoning.verified import ReplyVerdict

NUM_SOUNDS = 100
TRIES = 4
_ROW = "reasoning/verify"


def measure_verify(chat: Chat, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """Requests of sounds: the first reply; the first of four that the encoder's judge accepts; the
    same by look-again; and after thinking first. Correct is what a judge that shares no features
    with the encoder ranks first.

    Args:
        chat: what is measured.
        data: folder of mini's data.
        num: number of requests.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    items = evenly_spaced(read_test_items(data / "tests.jsonl.gz")["text->audio"], num)
    judge = build_judge("audio", data=data)
    ears = encoder_judge(chat, judge.gallery)
    found: dict[str, list[bool]] = {name: [] for name in ("first", "judge", "look", "think")}
    accepted: dict[str, list[bool]] = {"judge": [], "look": []}
    for item in items:
        messages = list(item.turns[0])
        options: dict[str, Any] = {"seed": item.seed % 2**31, "max_new_tokens": MAX_NEW_TOKENS}
        tried: list[Reply] = []
        verify = _verifier(ears, item, tried)
        by_judge = chat.reply(messages, verify=verify, tries=TRIES, **options)
        by_look = chat.reply(messages, verify="look-again", tries=TRIES, **options)
        replies = {
            "first": tried[0],
            "judge": by_judge,
            "look": by_look,
            "think": chat.reply(messages, think_first=True, **options),
        }
        for name, reply in replies.items():
            found[name].append(_is_right(judge, item, reply))
        for name in accepted:
            verification = replies[name].verification
            accepted[name].append(verification is not None and verification.passed)
        on_progress(1)
    metric = difference_metric(
        f"{_ROW}, best of {TRIES} - first", found["judge"], found["first"], start
    )
    yield with_gain(metric)
    yield accuracy_metric(f"{_ROW}, first reply", found["first"], start)
    yield accuracy_metric(f"{_ROW}, best of {TRIES} by the encoder", found["judge"], start)
    yield accuracy_metric(f"{_ROW}, accepted by the encoder", accepted["judge"], start)
    yield accuracy_metric(f"{_ROW}, best of {TRIES} by look-again", found["look"], start)
    yield accuracy_metric(f"{_ROW}, accepted by look-again", accepted["look"], start)
    yield accuracy_metric(f"{_ROW}, think first", found["think"], start)
    for name, label in (("look", "look-again"), ("think", "think first")):
        yield difference_metric(f"{_ROW}, {label} - first", found[name], found["first"], start)


def encoder_judge(chat: Chat, gallery: dict[str, Medium]) -> Judge:
    """A judge of sounds by the features of a chat's own audio encoder.

    Args:
        chat: a model that hears.
        gallery: concept -> its real item.
    """
    encoder: Any = chat.model.encoders["audio"]

    def encode(media: Any) -> np.ndarray:
        return encoder.encode(list(media)).tokens.float().flatten(1).cpu().numpy()

    mean = encode(gallery.values()).mean(axis=0)

    def features(media: Any) -> np.ndarray:
        rows = encode(media) - mean
        return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)

    return Judge(features, gallery)


def _verifier(judge: Judge, item: EvalItem, tried: list[Reply]) -> Callable[[Reply], ReplyVerdict]:
    """A verifier of a requested sound, which also keeps what it saw."""

    def verify(reply: Reply) -> ReplyVerdict:
        tried.append(reply)
        sounds = [medium for medium in reply.media if medium.modality == "audio"]
        if not sounds:
            return ReplyVerdict(False, "the reply holds no sound", -len(judge.concepts))
        (ranked,) = judge.rank(sounds[:1])
        rank = ranked.index(item.concept)
        return ReplyVerdict(rank == 0, f"it sounds like {ranked[0]}", -rank)

    return verify


def _is_right(judge: Judge, item: EvalItem, reply: Reply) -> bool:
    """Whether a reply is one sound, whose nearest real one is of the requested concept."""
    if [medium.modality for medium in reply.media] != ["audio"]:
        return False
    return judge.rank(reply.media)[0][0] == item.concept
