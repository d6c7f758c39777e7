"""The rows of MemWalker over joined clips and joined sounds: in which segment is it?"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from mmllm.conversation import Audio, Medium, Video
from mmllm.data.sources import read_text
from mmllm.evaluation.judges import RATE, SIDE, open_item, read_items
from mmllm.evaluation.metrics import Metric, accuracy_metric, with_threshold
from mmllm.evaluation.prompts import evenly_spaced
from mmllm.evaluation.reasoning.searching import OnProgress
from mmllm.reasoning.models import ChatModel
from mmllm.reasoning.reading import lexical_segment, likeliest_segments
from mmllm.reasoning.sources import LongMedium
from mmllm.reasoning.tree import TreeOptions, build_tree
from mmllm.reasoning.walk import answer_from, walk

NUM_SEGMENTS = 40
MIN_SEGMENT, MAX_WHOLE = 0.85, 0.2
OPTIONS = TreeOptions(num_children=8, summary_tokens=100)
_FRAMES, _FPS = 9, 8.0
_SECONDS = 2.5
"""Of each sound, about as long as the encoder's window."""


def measure_long_clip(
    model: ChatModel, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """Clips of different things, joined to one: when can you see each thing?

    Args:
        model: what is measured.
        data: folder of mini's data.
        num: number of clips.
        on_progress: called with the number of items done.
    """
    concepts, media = _different_items(data, "video", num)
    frames = np.concatenate([_frames(medium) for medium in media])
    clip = LongMedium(Video.from_numpy(frames, _FPS), seconds=_FRAMES / _FPS)
    questions = [f"When can you see the {label}?" for label in concepts]
    return _measure("reasoning/memwalker/clips", model, clip, questions, on_progress)


def measure_long_sound(
    model: ChatModel, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """Sounds of different things, takes that mini was not trained on, joined to one: when can you
    hear each thing?

    Args:
        model: what is measured.
        data: folder of mini's data.
        num: number of sounds.
        on_progress: called with the number of items done.
    """
    concepts, media = _different_items(data, "audio", num)
    samples = np.concatenate([_samples(medium) for medium in media])
    sound = LongMedium(Audio.from_numpy(samples, RATE), seconds=_SECONDS)
    questions = [f"When can you hear the {label}?" for label in concepts]
    return _measure("reasoning/memwalker/sounds", model, sound, questions, on_progress)


def _measure(
    row: str,
    model: ChatModel,
    source: LongMedium,
    questions: Sequence[str],
    on_progress: OnProgress,
) -> Iterator[Metric]:
    """The question of number n is about segment n."""
    start = time.perf_counter()
    tree = build_tree(model, source, OPTIONS)
    assert len(tree.segments) == len(questions)
    places = [tree.place_of(index) for index in tree.segments]
    right: dict[str, list[bool]] = {name: [] for name in ("walk", "whole", "lexical", "likelihood")}
    for number, question in enumerate(questions):
        found = walk(model, tree, question, memory_tokens=100, max_new_tokens=16)
        right["walk"].append(found.answer is not None and found.segments[-1] == number)
        prompt = tree.message(tree.root, after=question)
        right["whole"].append(answer_from(model, prompt, options=places) == places[number])
        right["lexical"].append(lexical_segment(tree, question) == number)
        on_progress(1)
    segments = likeliest_segments(model, tree, questions)
    right["likelihood"] = [index == number for number, index in enumerate(segments)]
    metric = accuracy_metric(f"{row}, walk ends at the right segment", right["walk"], start)
    yield with_threshold(metric, MIN_SEGMENT)
    metric = accuracy_metric(f"{row}, whole", right["whole"], start)
    yield replace(metric, threshold=f"<= {MAX_WHOLE}", met=metric.value <= MAX_WHOLE)
    label = "segment whose description shares the rarest words"
    yield accuracy_metric(f"{row}, {label}", right["lexical"], start)
    label = "segment of the largest likelihood, no tree"
    yield accuracy_metric(f"{row}, {label}", right["likelihood"], start)


def _different_items(data: Path, modality: str, num: int) -> tuple[list[str], list[Medium]]:
    """Labels and media of different concepts."""
    rows = json.loads(read_text(data / "concepts.json"))
    rows += json.loads(read_text(data / "sounds.json.gz"))["concepts"]
    labels = {row["id"]: row["label"] for row in rows}
    split = "heldout_take" if modality == "audio" else "train"
    items = {item["concept"]: item for item in read_items(data, modality) if item["split"] == split}
    chosen = evenly_spaced(list(items.values()), num)
    return [labels[item["concept"]] for item in chosen], [open_item(data, item) for item in chosen]


def _frames(clip: Medium) -> np.ndarray:
    """uint8[9, 64, 64, 3]"""
    assert isinstance(clip, Video)
    size = (SIDE, SIDE)
    frames = [PILImage.fromarray(frame).resize(size) for frame in clip.sample_frames(_FRAMES)]
    return np.stack([np.asarray(frame) for frame in frames])


def _samples(sound: Medium) -> np.ndarray:
    """float32[S] of the same length for every sound"""
    assert isinstance(sound, Audio)
    length = round(_SECONDS * RATE)
    samples = sound.resample(RATE).to_numpy().mean(axis=0)[:length]
    return np.pad(samples, (0, length - len(samples)))
