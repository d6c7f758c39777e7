"""Rows `composing/…` of `mmllm evaluate MODEL --tasks composing`: does it put together what it has
never seen together, in pictures, clips and sounds, in reading, in edits by talking?

Everything asked for is held out of all training (mmllm.mini.world): combinations, wordings, takes
of sounds. Media are judged by networks that are trained on renderings and share nothing with mini.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmllm.conversation import Medium, Message, user
from mmllm.evaluation.everyday import MediumJudge
from mmllm.evaluation.everyday_judges import load_judges
from mmllm.evaluation.metrics import Metric, accuracy_metric, with_limit, with_threshold
from mmllm.evaluation.prompts import MAX_NEW_TOKENS
from mmllm.mini.world import wordings
from mmllm.mini.world.captions import caption, clip_caption, describe, describe_clip
from mmllm.mini.world.clips import Clip, draw_heldout_clip
from mmllm.mini.world.conversations import animate, converse, draw, refuse
from mmllm.mini.world.hearing import play
from mmllm.mini.world.questions import question, read
from mmllm.mini.world.scenes import Scene, draw_heldout_scene
from mmllm.mini.world.sounds import (
    Soundscape,
    describe_soundscape,
    draw_heldout_soundscape,
    soundscape_caption,
)
from mmllm.mini.world.talk import Talk

Described = Scene | Clip | Soundscape
OnProgress = Callable[[int], object]
BATCH = 16
"""Conversations of one call."""
TURNS = 6
"""Exchanges of a long conversation."""
_MAX_FALSE_REFUSALS = 0.03
_PLAIN_PAIR = "pair"
"""The kind and the layout of two things in no stated order."""


@functools.cache
def judges() -> dict[str, MediumJudge]:
    """Those of `everyday` by modality."""
    return load_judges()


def missing_judges(name: str) -> list[str]:
    """The modalities whose judge a row needs and that have none.

    Args:
        name: of a row; any other needs none.

    Raises:
        AssetError: there is no judge at all.
    """
    needed = [_MAKING[name][0]] if name in _MAKING else _JUDGED.get(name, [])
    return [modality for modality in needed if modality not in judges()]


def heldout_item(modality: str, kinds: Sequence[str], rng: random.Random) -> Described:
    """Draw what training never combines.

    Args:
        modality: of what is to be made.
        kinds: of scenes.
        rng: where chance comes from.
    """
    if modality == "video":
        return draw_heldout_clip(rng)
    if modality == "audio":
        return draw_heldout_soundscape(rng)
    while True:
        kind = rng.choice(kinds)
        scene = draw_heldout_scene(kind, rng)
        if not (kind == _PLAIN_PAIR and scene.layout == _PLAIN_PAIR):  # with a relation
            return scene


def words_of(described: Described) -> str:
    """The canonical caption."""
    if isinstance(described, Scene):
        return describe(described)
    return (
        describe_clip(described) if isinstance(described, Clip) else describe_soundscape(described)
    )


def request_for(described: Described, rng: random.Random) -> Message:
    """Ask for something in words that training never has.

    Args:
        described: what is asked for.
        rng: chooses the words.
    """
    if isinstance(described, Scene):
        kind, words = "draw", caption(described, rng, "heldout")
    elif isinstance(described, Clip):
        kind, words = "animate", clip_caption(described, rng, "heldout")
    else:
        kind, words = "sound", soundscape_caption(described, rng, "heldout")
    return user(wordings.request(kind, words, "heldout", rng))


def is_right(reply: Message, described: Described) -> bool:
    """Whether a reply makes one medium, and that one as it was asked for.

    Args:
        reply: the reply.
        described: what was asked for.
    """
    modality = {Scene: "image", Clip: "video", Soundscape: "audio"}[type(described)]
    media = reply.media
    return [medium.modality for medium in media] == [modality] and judges()[modality].is_of(
        media[0], described
    )


def measure_making(
    chat: Any,
    data: Path,
    num: int,
    on_progress: OnProgress,
    *,
    name: str,
    modality: str,
    kinds: Sequence[str],
    bar: float,
    share: float,
) -> Iterator[Metric]:
    """Make held-out combinations, by the decoder from the caption and by the whole model.

    Args:
        chat: the model.
        data: not read.
        num: number of items.
        on_progress: called with the number of items done.
        name: of the row.
        modality: of what is made.
        kinds: of scenes.
        bar: what the decoder must reach.
        share: what the whole model must reach, of the decoder.
    """
    rng = random.Random(name)
    items = [heldout_item(modality, kinds, rng) for _ in range(num)]
    start = time.perf_counter()
    made = _from_captions(chat, modality, [words_of(item) for item in items])
    right = [
        judges()[modality].is_of(medium, item) for medium, item in zip(made, items, strict=True)
    ]
    alone = with_threshold(accuracy_metric(f"{name}, from captions", right, start), bar)
    yield alone
    start = time.perf_counter()
    replies = _reply_all(chat, [[request_for(item, rng)] for item in items], on_progress)
    right = [is_right(reply, item) for reply, item in zip(replies, items, strict=True)]
    note = f" ({share:g} x from captions)"
    yield with_threshold(accuracy_metric(name, right, start), share * alone.value, note)
    worded = [
        words_of(item) in reply.text.lower() or words_of(item) in reply.text
        for reply, item in zip(replies, items, strict=True)
    ]
    yield replace(accuracy_metric(f"{name}, in words", worded, start), seconds=0.0)


def measure_reading(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """Ask about pictures of held-out scenes; a reply is right if it is the expected sentence.

    Args:
        chat: the model.
        data: not read.
        num: number of questions of each kind.
        on_progress: called with the number of items done.
    """
    for name, (tables, bar) in _QUESTIONS.items():
        rng = random.Random(f"composing/reading, {name}")
        start = time.perf_counter()
        talks: list[Talk] = []
        while len(talks) < num:
            talk = Talk(rng, "heldout")
            scene = heldout_item("image", (_PLAIN_PAIR, "pair, colours", "groups"), rng)
            assert isinstance(scene, Scene)
            if scene.layout == _PLAIN_PAIR:  # whose order the image decides
                scene = replace(scene, layout="left")
            if question(talk, scene, rng.choice(tables), talk.image(scene)):
                talks.append(talk)
        replies = _reply_all(chat, [talk.messages[:-1] for talk in talks], on_progress)
        right = [
            _plain(reply.text) == _plain(talk.messages[-1].text)
            for reply, talk in zip(replies, talks, strict=True)
        ]
        yield with_threshold(accuracy_metric(f"composing/reading, {name}", right, start), bar)


_QUESTIONS: dict[str, tuple[tuple[str, ...], float]] = {
    "both things": (("what",), 0.90),
    "relation": (("where", "side"), 0.90),
    "colour": (("colour",), 0.90),
    "count": (("count",), 0.85),
    "yes or no": (("yes or no",), 0.90),
}
"""Name -> the tables of wordings, and the bar."""


def measure_edits(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """Draw, then ask for changes; the model's own replies stand in the history.

    Args:
        chat: the model.
        data: not read.
        num: number of conversations.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    talks = [
        converse("edits", "heldout", random.Random(f"composing/edits {i}"), targets=False)
        for i in range(num)
    ]
    right: list[bool] = []
    conversations: list[list[Message]] = [[] for _ in talks]
    for turn in range(0, max(len(talk.messages) for talk in talks), 2):
        active = [i for i, talk in enumerate(talks) if turn < len(talk.messages)]
        for i in active:
            conversations[i].append(talks[i].messages[turn])
        replies = _reply_all(chat, [conversations[i] for i in active], lambda _: None)
        for i, reply in zip(active, replies, strict=True):
            conversations[i].append(reply)
            if turn:
                right.append(is_right(reply, talks[i].shown[turn + 1]))
    on_progress(num)
    yield with_threshold(accuracy_metric("composing/edits", right, start), 0.85)


def measure_turns(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """Ask for something in the sixth exchange of a conversation, and alone.

    The exchanges before are of all kinds, with the replies that the data have.

    Args:
        chat: the model.
        data: not read.
        num: number of conversations.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    talks: list[Talk] = []
    for i in range(num):
        rng = random.Random(f"composing/turns {i}")
        while True:
            talk = converse("mixed", "heldout", rng)
            if len(talk.messages) >= 2 * (TURNS - 1):
                break
        del talk.messages[2 * (TURNS - 1) :]
        last = len(talk.messages)
        talk.shown = {place: item for place, item in talk.shown.items() if place < last}
        talk.scene = None  # the last request is to stand alone
        while not rng.choice((draw, animate, play, read, refuse))(talk):
            pass
        talks.append(talk)
    results = []
    for conversations in (
        [talk.messages[-2:-1] for talk in talks],
        [talk.messages[:-1] for talk in talks],
    ):
        replies = _reply_all(chat, conversations, lambda _: None)
        results.append(
            [_as_wanted(reply, talk) for reply, talk in zip(replies, talks, strict=True)]
        )
    on_progress(num)
    alone = accuracy_metric("composing/turns, alone", results[0], start)
    yield alone
    yield with_threshold(
        accuracy_metric("composing/turns, sixth", results[1], start),
        0.95 * alone.value,
        " (0.95 x alone)",
    )


def measure_honesty(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """Ask for what is not in the world, and for what is.

    Args:
        chat: the model.
        data: not read.
        num: number of requests of each sort.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    asked = [
        converse("refuse", "heldout", random.Random(f"composing/unknown {i}")) for i in range(num)
    ]
    replies = _reply_all(chat, [talk.messages[:-1] for talk in asked], on_progress)
    honest = [not reply.media and reply.text.startswith(_HONEST) for reply in replies]
    yield with_threshold(accuracy_metric("composing/unknown", honest, start), 0.90)
    start = time.perf_counter()
    rng = random.Random("composing/known")
    known = [
        heldout_item(
            rng.choice(("image", "image", "video", "audio")), ("colour", "count", "pair"), rng
        )
        for _ in range(num)
    ]
    replies = _reply_all(
        chat, [[request_for(item, rng)] for item in known], on_progress, media=False
    )
    refused = [not reply.media for reply in replies]
    metric = accuracy_metric("composing/known, refused", refused, start)
    yield with_limit(metric, _MAX_FALSE_REFUSALS)


_HONEST = ("I cannot ", "I do not know", "I only understand")


def _as_wanted(reply: Message, talk: Talk) -> bool:
    """Whether a reply is as the last one of a conversation."""
    wanted = talk.shown.get(len(talk.messages) - 1)
    if wanted is not None:
        return is_right(reply, wanted)
    return not reply.media and _plain(reply.text) == _plain(talk.messages[-1].text)


def _plain(text: str) -> str:
    """Small letters, without a mark at the end."""
    return text.strip().rstrip(".!").lower()


def _reply_all(
    chat: Any,
    conversations: Sequence[Sequence[Message]],
    on_progress: OnProgress,
    *,
    media: bool = True,
) -> list[Message]:
    """Replies to conversations, the same seeds for the same places."""
    replies: list[Message] = []
    for start in range(0, len(conversations), BATCH):
        group = conversations[start : start + BATCH]
        made = chat.reply_many(
            group,
            seeds=range(start, start + len(group)),
            max_new_tokens=MAX_NEW_TOKENS,
            render_media=media,
        )
        replies += [reply.message for reply in made]
        on_progress(len(group))
    return replies


@torch.inference_mode()
def _from_captions(chat: Any, modality: str, captions: Sequence[str]) -> list[Medium]:
    """What the decoder alone samples from captions."""
    decoder = chat.model.decoders[chat.model.renderer.output_keys[modality]]
    made: list[Medium] = []
    for start in range(0, len(captions), BATCH):
        group = captions[start : start + BATCH]
        seeds = range(start, start + len(group))
        made += decoder.sample(
            decoder.encode_captions(group),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
    return made


_MAKING: dict[str, tuple[str, tuple[str, ...], float, float]] = {
    "composing/pair": ("image", (_PLAIN_PAIR,), 0.90, 0.95),
    "composing/colours": ("image", ("pair, colours",), 0.80, 0.95),
    "composing/groups": ("image", ("three", "four"), 0.70, 0.90),
    "composing/colour": ("image", ("colour",), 0.90, 0.95),
    "composing/count": ("image", ("count",), 0.85, 0.95),
    "composing/clip": ("video", (), 0.85, 0.90),
    "composing/sound": ("audio", (), 0.70, 0.90),
}
"""Row -> modality, kinds of scenes, bar of the decoder and share of it for the whole model."""
_JUDGED = {"composing/edits": ["image"], "composing/turns": ["image", "audio", "video"]}
"""Other rows -> modalities of what is judged."""
ROWS: dict[str, tuple[Callable[..., Iterator[Metric]], int]] = {
    **{
        name: (
            functools.partial(
                measure_making, name=name, modality=modality, kinds=kinds, bar=bar, share=share
            ),
            100,
        )
        for name, (modality, kinds, bar, share) in _MAKING.items()
    },
    "composing/reading": (measure_reading, 100),
    "composing/edits": (measure_edits, 60),
    "composing/turns": (measure_turns, 200),
    "composing/unknown": (measure_honesty, 100),
}
"""Name of a task -> what measures it, and the number of items; as mmllm.evaluation.insight.ROWS."""
