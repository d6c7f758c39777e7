"""Rows `insight/steering` and `insight/steering/features` of `mmllm evaluate`: what is drawn,
played and animated under an edit of the few positions of the language model that stand for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.conversation import Medium, user
from mmllm.data.sources import parse_json, read_text
from mmllm.evaluation.dictionaries import open_study
from mmllm.evaluation.judges import Judge, build_judge
from mmllm.evaluation.metrics import Metric, accuracy_metric, with_limit, with_threshold
from mmllm.insight.features.directions import concept_features
from mmllm.insight.hooks import Edit, edit
from mmllm.insight.positions import Positions
from mmllm.insight.sites import model_of
from mmllm.insight.steering import MAX_NEW_TOKENS, Direction, late_site, reply_states, steering
from mmllm.insight.study import DictionaryStudy

_MIN_STEERED, _MIN_BY_FEATURES, _MAX_RANDOM = 0.9, 0.5, 0.05
REQUESTS = {
    "image": "Draw {}.",
    "audio": "Play the sound of {}.",
    "video": "Animate {}.",
}
NUM_FEATURES = 5
"""Features of a dictionary that stand for a thing."""
STRENGTH = 3.0
"""Of the direction that they make, in units of their own activations: the best of 1, 1.5, 2 and 3
by the condition of a picture that is nearest, with a small dictionary."""
OTHER_REQUESTS = {
    "image": ("Show me a picture of {}.", "I would like to see {}.", "Can you paint {}?"),
    "audio": ("Let me hear {}.", "I would like to listen to {}.", "What does {} sound like?"),
    "video": ("Show me {} in motion.", "I would like a clip of {}.", "Make {} move."),
}
"""Those on which features are chosen."""

OnProgress = Callable[[int], object]


def measure_steering(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """Ask for one thing, and add the difference of the states of another one at the signal
    positions: how often the judge finds the other; with a random direction of the same size too.

    Args:
        chat: the model.
        data: the folder of mini's data.
        num: number of items.
        on_progress: called with the number of items done.
    """
    model = model_of(chat)
    site = late_site(chat)
    for modality in model.renderer.output_keys:
        start = time.perf_counter()
        judge = build_judge(modality, data=data)
        asked, wanted = _pairs(judge, data, modality, num)
        conversations = [[user(REQUESTS[modality].format(thing))] for _, thing in asked]
        recorded = reply_states(chat, site, conversations, media=modality)
        states = {name: part for (name, _), part in zip(asked, recorded, strict=True)}
        directions = [
            Direction(site, states[other] - states[own])
            for (own, _), (other, _) in zip(asked, wanted, strict=True)
        ]
        for note, steered in (
            ("difference", directions),
            ("random", [one.random(seed) for seed, one in enumerate(directions)]),
        ):
            media = _steered_media(chat, site, conversations, steered, modality)
            nearest = [ranked[0] for ranked in judge.rank(media)]
            hits = [found == name for found, (name, _) in zip(nearest, wanted, strict=True)]
            metric = accuracy_metric(f"insight/steering, {modality}, {note}", hits, start)
            if note == "difference":
                yield with_threshold(metric, _MIN_STEERED)
            else:
                yield with_limit(metric, _MAX_RANDOM)
            start = time.perf_counter()
    on_progress(num)


def measure_feature_steering(
    chat: Any, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """The same with directions of few features of the dictionary that `insight/sae` measures: those
    of the thing that is asked for are removed and those of the other one added. Features are chosen
    on other requests; next to them, random directions of the same size.

    Args:
        chat: the model.
        data: the folder of mini's data.
        num: number of items.
        on_progress: called with the number of items done.
    """
    study = open_study(chat)
    for modality in model_of(chat).renderer.output_keys:
        start = time.perf_counter()
        judge = build_judge(modality, data=data)
        asked, wanted = _pairs(judge, data, modality, num)
        conversations = [[user(REQUESTS[modality].format(thing))] for _, thing in asked]
        directions = feature_directions(chat, study, modality, asked, wanted)
        for note, steered in (
            ("SAE features", directions),
            ("random of their size", [one.random(seed) for seed, one in enumerate(directions)]),
        ):
            media = _steered_media(
                chat, study.site, conversations, steered, modality, strength=STRENGTH
            )
            ranked = judge.rank(media)
            for first in (1, 5):
                pairs = zip(ranked, wanted, strict=True)
                hits = [name in found[:first] for found, (name, _) in pairs]
                name = f"insight/steering/features, {modality}, {note}, top {first}"
                metric = accuracy_metric(name, hits, start)
                if note == "SAE features":
                    yield with_threshold(metric, _MIN_BY_FEATURES)
                else:
                    yield with_limit(metric, _MAX_RANDOM)
            start = time.perf_counter()
    on_progress(num)


def feature_directions(
    chat: Any,
    study: DictionaryStudy,
    modality: str,
    asked: Sequence[tuple[str, str]],
    wanted: Sequence[tuple[str, str]],
) -> list[Direction]:
    """The direction of each item: from the features of what is asked for to those of what is
    wanted.

    Args:
        chat: the model.
        study: its dictionary.
        modality: that is made.
        asked: (concept, name with its article) of each item.
        wanted: likewise, the same concepts in another order.
    """
    conversations = {
        (name, request): [user(request.format(thing))]
        for name, thing in asked
        for request in OTHER_REQUESTS[modality]
    }
    recorded = reply_states(chat, study.site, list(conversations.values()), media=modality)
    states: dict[str, list[Tensor]] = {}
    for (name, _), part in zip(conversations, recorded, strict=True):
        states.setdefault(name, []).append(part)
    found = concept_features(study.dictionary, states, NUM_FEATURES)
    return [
        found[other].instead_of(found[own], study.site)
        for (own, _), (other, _) in zip(asked, wanted, strict=True)
    ]


def _pairs(
    judge: Judge, data: Path, modality: str, num: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(concept, name with its article) of what is asked for, spread over the judge's concepts, and
    of what is wanted instead: another one of these for each."""
    if modality == "audio":
        rows = parse_json(read_text(data / "sounds.json.gz"))["concepts"]
        things = {row["id"]: row["thing"] for row in rows}
    else:
        things = {
            row["id"]: row["caption"] for row in parse_json(read_text(data / "concepts.json"))
        }
    names = [name for name in judge.concepts if name in things]
    chosen = [names[round(at)] for at in np.linspace(0, len(names) - 1, min(num, len(names)))]
    pairs = [(name, things[name]) for name in chosen]
    half = len(pairs) // 2
    return pairs, [*pairs[half:], *pairs[:half]]


def _steered_media(
    chat: Any,
    site: str,
    conversations: Sequence[Any],
    directions: Sequence[Direction],
    modality: str,
    strength: float = 1.0,
) -> list[Medium]:
    """The medium of each reply, each conversation steered in its own direction."""
    edits = [steering(chat, direction, strength, "signal") for direction in directions]
    modalities: Any = dict.fromkeys(model_of(chat).renderer.output_keys, "forbid")
    modalities[modality] = "force"
    with edit(chat, site, _by_conversation(edits)):
        replies = chat.reply_many(
            conversations,
            modalities=modalities,
            temperature=0.0,
            max_new_tokens=MAX_NEW_TOKENS,
            seeds=list(range(len(conversations))),
        )
    return [reply.media[0] for reply in replies]


def _by_conversation(edits: Sequence[Edit]) -> Edit:
    """One edit that treats each conversation by its own."""

    def function(states: Tensor, at: Positions) -> Tensor:
        edited = states.clone()
        for number in np.unique(at.conversation):
            own = at.conversation == number
            where = torch.from_numpy(own).to(states.device)
            edited[where] = edits[number](states[where], at[own])
        return edited

    return function
