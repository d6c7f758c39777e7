"""Everyday requests: what people type first, and whether a reply is right.

`mmllm/mini/data/everyday.jsonl` holds the requests and what a right reply holds; the rules are
stated in the README next to it. Words are judged by patterns, media by a `MediumJudge` of their
modality. Measured by `mmllm evaluate MODEL --tasks everyday`, only where it is asked for.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from mmllm.conversation import Audio, Image, Medium, Message, Video, assistant, user
from mmllm.evaluation.metrics import Metric, accuracy_metric, with_threshold
from mmllm.evaluation.prompts import EvalItem, EvalResponse
from mmllm.evaluation.tasks import ScoredItem
from mmllm.mini.world.clips import FPS, Clip, render_clip
from mmllm.mini.world.rendering import render
from mmllm.mini.world.scenes import Group, Layout, Scene
from mmllm.mini.world.sounds import RATE, Soundscape, Voice, render_soundscape

KINDS = (
    *("plain", "polite", "typo", "compound", "count", "relation", "colour", "negation"),
    *("follow-up", "memory", "self", "sound", "clip", "reading", "unknown"),
)
TASKS = tuple(f"everyday/{kind}" for kind in KINDS)
"""A task for each kind of request."""
NUM_OF_A_KIND = 20
THRESHOLD, KIND_THRESHOLD = 0.85, 0.65
"""Of all requests, and of each kind."""
MEDIA_RULES = ("image", "audio", "video")
_FREE_LAYOUTS: dict[int, Layout] = {1: "alone", 2: "pair", 3: "row", 4: "corners"}
"""Number of groups -> their layout where a description leaves it free."""


class MediumJudge(Protocol):
    """Says what a medium of one modality holds."""

    def shows(self, medium: Medium, rule: Mapping[str, Any]) -> bool:
        """Whether a medium is as a rule of `expect` asks.

        Args:
            medium: the medium.
            rule: the value of "image", "audio" or "video".
        """
        ...

    def is_of(self, medium: Medium, described: Any) -> bool:
        """Whether a medium shows what a description of mini's world says.

        Args:
            medium: the medium.
            described: a scene, clip or soundscape.
        """
        ...

    def names(self, medium: Medium) -> set[str]:
        """The ids of all things or sounds in a medium."""
        ...


Judges = Mapping[str, MediumJudge]
"""By modality; one that has no judge yet is absent."""


def read_requests(data: Path) -> dict[str, list[EvalItem]]:
    """The requests by task, the media that users show rendered.

    Args:
        data: the folder of mini's data.
    """
    by_task: dict[str, list[EvalItem]] = {task: [] for task in TASKS}
    for line in (data / "everyday.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        task = f"everyday/{row['kind']}"
        rng = random.Random(row["id"])
        turns: list[list[Message]] = []
        for turn in row["turns"]:
            media = [
                _rendered(modality, description, rng)
                for medium in turn.get("media", ())
                for modality, description in medium.items()
            ]
            if "assistant" in turn:
                turns[-1].append(assistant(turn["assistant"], *media))
            elif turns and turns[-1][-1].role == "assistant":
                turns[-1].append(user(*media, turn["user"]))
            else:
                turns.append([user(*media, turn["user"])])
        item = EvalItem(row["id"], task, tuple(map(tuple, turns)), expect=row["expect"])
        by_task[task].append(item)
    return by_task


def scene_of(description: Mapping[str, Any]) -> Scene:
    """The scene of a description, a layout that it leaves free filled in."""
    groups = tuple(Group(**group) for group in description["groups"])
    layout = description.get("layout") or _FREE_LAYOUTS[len(groups)]
    return Scene(groups, layout, description.get("ground"))


def _rendered(modality: str, description: Any, rng: random.Random) -> Medium:
    """A medium that the user shows; sounds are takes that training never has."""
    match modality:
        case "image":
            return Image.from_numpy(render(scene_of(description), rng))
        case "audio":
            scape = Soundscape((Voice(description),))
            wave = render_soundscape(scape, rng, heldout_takes=True)
            return Audio.from_numpy(wave, RATE)
        case "video":
            group = Group(description["thing"], colour=description.get("colour"))
            clip = Clip(Scene((group,)), (description["motion"],))
            return Video.from_numpy(render_clip(clip, rng), FPS)
    raise ValueError(f"everyday.jsonl: {modality!r} is no modality")


def is_right(
    expect: Mapping[str, Any], words: str, media: Sequence[Medium], judges: Judges
) -> bool:
    """Whether a reply is what a request expects.

    Args:
        expect: of the request.
        words: the text of the reply.
        media: of the reply, in order.
        judges: of every modality in `needed_judges`.
    """
    if "any" in expect:
        return any(is_right(part, words, media, judges) for part in expect["any"])
    if "all" in expect:
        parts = expect["all"]
        wanted = Counter(name for part in parts for name in part if name in MEDIA_RULES)
        if Counter(medium.modality for medium in media) != wanted:
            return False
        return all(
            is_right(part, words, [m for m in media if m.modality in part], judges)
            for part in parts
        )
    if expect.get("no_media") and media:
        return False
    for modality in MEDIA_RULES:
        if modality in expect:
            return [medium.modality for medium in media] == [modality] and judges[modality].shows(
                media[0], expect[modality]
            )
    return words_are_right(expect, words) and _nearest_at_most(expect, media, judges)


def words_are_right(expect: Mapping[str, Any], reply: str) -> bool:
    """Whether the words of a reply are right, whatever media stand between them.

    Args:
        expect: of the request; without a rule for words none are right.
        reply: the text of the reply.
    """
    if "any" in expect:
        return any(words_are_right(part, reply) for part in expect["any"])
    rule = expect.get("text") or expect.get("honest")
    if rule is None:
        return False
    words = reply.lower().replace("\u2019", "'")
    found = [
        any(re.search(pattern, words, re.DOTALL) for pattern in rule.get(name, ()))
        for name in ("any", "none")
    ]
    return found == [True, False]


def _nearest_at_most(expect: Mapping[str, Any], media: Sequence[Medium], judges: Judges) -> bool:
    """Whether an honest reply makes no medium, or one of the nearest things alone."""
    rule = expect.get("honest")
    if rule is None or not media:
        return True
    if rule["media"] == "none" or len(media) > 1:
        return False
    names = judges[media[0].modality].names(media[0])
    return bool(names) and names <= set(rule["nearest"])


def needed_judges(expect: Mapping[str, Any], media: Sequence[Medium]) -> set[str]:
    """The modalities whose judges decide whether a reply is right.

    All that the request asks for are among them, made or not: leaving out only what was made
    would count a reply that fails to make a medium, and drop one that makes it.

    Args:
        expect: of the request.
        media: of the reply.
    """
    rules = dict(_rules(expect))
    needed = {name for name in rules if name in MEDIA_RULES}
    if "honest" in rules:
        needed |= {medium.modality for medium in media}
    return needed


def _rules(expect: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every (name, rule), those inside "all" and "any" too."""
    for name, rule in expect.items():
        if name in ("all", "any"):
            for part in rule:
                yield from _rules(part)
        else:
            yield name, rule


def score_requests(responses: Sequence[EvalResponse], judges: Judges) -> list[ScoredItem]:
    """Score the replies to requests, but those that need a judge which is missing.

    Args:
        responses: to items of `read_requests`.
        judges: by modality.
    """
    scored = []
    for response in responses:
        item, media = response.item, response.media
        if needed_judges(item.expect, media) - judges.keys():
            continue
        prediction = {
            "text": response.text,
            "modalities": [medium.modality for medium in media],
            "named": [
                sorted(judges[medium.modality].names(medium)) if medium.modality in judges else None
                for medium in media
            ],
        }
        correct = is_right(item.expect, response.text, media, judges)
        scored.append(ScoredItem(item.id, item.task, correct, None, prediction))
    return scored


def request_metrics(
    scored: Sequence[ScoredItem], requests: Sequence[EvalItem], start: float
) -> list[Metric]:
    """The accuracy of each kind, and of all where every kind was asked.

    A kind of which some requests are not scored has a threshold that is not compared; one of which
    none is has no metric.

    Args:
        scored: what `score_requests` returns.
        requests: those that were asked.
        start: `time.perf_counter()` when the measurement began.
    """
    asked = Counter(item.task for item in requests)
    metrics = []
    for task in TASKS:
        correct = [entry.correct for entry in scored if entry.task == task]
        if correct:
            metric = replace(accuracy_metric(task, correct, start), seconds=0.0)
            metrics.append(_compared(metric, asked[task], KIND_THRESHOLD))
    if scored and asked.keys() == set(TASKS):
        metric = accuracy_metric("everyday", [entry.correct for entry in scored], start)
        metrics.append(_compared(metric, len(requests), THRESHOLD))
    return metrics


def _compared(metric: Metric, num_asked: int, threshold: float) -> Metric:
    """With a threshold, which is compared if all that was asked is scored."""
    compared = with_threshold(metric, threshold)
    if metric.n == num_asked:
        return compared
    return replace(compared, threshold=f"{threshold:.3f} of {num_asked}", met=None)
