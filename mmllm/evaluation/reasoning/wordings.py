"""The row of wordings: which way of asking for a sound serves a model best, on unseen sounds?"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmllm.conversation import user
from mmllm.data.sources import read_text
from mmllm.evaluation.judges import Judge, build_judge
from mmllm.evaluation.metrics import Metric, accuracy_metric, difference_metric, with_gain
from mmllm.evaluation.prompts import MAX_NEW_TOKENS, RepliesInBatches
from mmllm.evaluation.reasoning.searching import OnProgress
from mmllm.reasoning.wording import Score, best_wording, grammar

NUM_EVALUATIONS = 1200
MIN_GAIN = 0.05
SEEDS = 3
"""Sounds of each concept on which a wording is measured."""
BATCH = 16
WORDINGS = grammar(
    "{start}{verb} {{{noun}}}{end}",
    start=["", "Please ", "Now "],
    verb=["play", "make", "imitate", "record", "generate"],
    noun=["caption", "thing"],
    end=[".", " for me.", ", nothing else."],
)
_ROW = "reasoning/wording"


class SoundRequest(NamedTuple):
    """A sound to ask for: one of a concept."""

    concept: str
    caption: str
    thing: str
    seed: int

    def worded(self, wording: str) -> str:
        """The request in a wording with {caption} or {thing}."""
        text = wording.format(caption=self.caption, thing=self.thing)
        return text[:1].upper() + text[1:]


def measure_wording(
    chat: RepliesInBatches, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """The best wording of a grammar against the best of those of the data, each found by up to
    `num` evaluations on half of the concepts, as many for each wording, measured on the other half.

    Args:
        chat: what is measured.
        data: folder of mini's data.
        num: number of evaluations, at most, but for one of each wording.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    judge = build_judge("audio", data=data)
    known = json.loads(read_text(data / "prompts.json"))["sound"]["heldout"]
    requests = _requests(data)
    score = _score(chat, judge, on_progress)
    searched, heldout = requests[0::2], requests[1::2]
    wordings = [*known, *WORDINGS]
    budget = max(num * 3 // 4, len(wordings))
    found = best_wording(wordings, _repeated(searched), score, budget=budget)
    at_hand = best_wording(
        known, _repeated(searched), score, budget=budget * len(known) // len(wordings)
    )
    by_found, by_known = (
        score([(wording, request) for request in _repeated(heldout)[:num]])
        for wording in (found.best, at_hand.best)
    )
    metric = difference_metric(f"{_ROW}, gain of {found.best!r}", by_found, by_known, start)
    yield with_gain(metric, MIN_GAIN)
    for wording, values in ((found.best, by_found), (at_hand.best, by_known)):
        correct = [value == 1 for value in values]
        yield accuracy_metric(f"{_ROW}, {wording!r} on unseen sounds", correct, start)


def _requests(data: Path) -> list[SoundRequest]:
    concepts = json.loads(read_text(data / "sounds.json.gz"))["concepts"]
    return [
        SoundRequest(row["id"], row["caption"], row["thing"], zlib.crc32(row["id"].encode()))
        for row in concepts
    ]


def _repeated(requests: Sequence[SoundRequest]) -> list[SoundRequest]:
    return [
        request._replace(seed=(request.seed + number) % 2**31)
        for number in range(SEEDS)
        for request in requests
    ]


def _score(chat: RepliesInBatches, judge: Judge, on_progress: OnProgress) -> Score[SoundRequest]:
    """1 for a reply of one sound, whose nearest real one is of the requested concept, else 0."""

    def score(pairs: Sequence[tuple[str, SoundRequest]]) -> list[float]:
        values: list[float] = []
        for start in range(0, len(pairs), BATCH):
            group = pairs[start : start + BATCH]
            replies: Sequence[Any] = chat.reply_many(
                [[user(request.worded(wording))] for wording, request in group],
                seeds=[request.seed for _, request in group],
                max_new_tokens=MAX_NEW_TOKENS,
            )
            for reply, (_, request) in zip(replies, group, strict=True):
                is_sound = [medium.modality for medium in reply.media] == ["audio"]
                right = is_sound and judge.rank(reply.media)[0][0] == request.concept
                values.append(float(right))
            on_progress(len(group))
        return values

    return score
