"""Rows `insight/heads`, `insight/heads/text` and `insight/copying` of `mmllm evaluate`: what
induction heads do for repeated tokens, for plain text, and for pictures and sounds that a sequence
gives names to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.data.sources import parse_json, read_text
from mmllm.evaluation.judges import open_item, read_items
from mmllm.evaluation.metrics import (
    Metric,
    accuracy_metric,
    difference_metric,
    mean_metric,
    with_limit,
    with_threshold,
)
from mmllm.features.cache import FeatureCache
from mmllm.insight.heads import (
    ablated,
    head_table,
    in_context_scores,
    repeat_losses,
    start_ids,
    token_losses,
)
from mmllm.insight.learning import Example, Part, copying, template_task
from mmllm.insight.sites import model_of

NUM_HEADS, NUM_COPYING_HEADS = 5, 10
"""Heads that are ablated, those that match prefixes best."""
PAIRS = (
    ("text", "text"),
    ("image", "image"),
    ("audio", "audio"),
    ("text", "image"),
    ("image", "text"),
    ("image", "audio"),
    ("audio", "image"),
    ("audio", "text"),
)
"""What is shown with its label, and what is asked for: of one modality another style or take."""
_ABLATED_PAIRS = PAIRS[:3]
_MIN_RISE, _MAX_CONTROL_RISE = 5.0, 1.0
_MIN_COPYING, _MAX_ABLATED = 0.45, 0.30
_MIN_SHARE = 0.5
_SHOWN_STYLE, _ASKED_STYLE = "fluent-3d", "twemoji"
_SHOWN_TAKE, _ASKED_TAKE = 0, 6

WINDOW = 512
"""Tokens of a window of text, the first of which is the start token."""
BANDS = ((1, 8), (9, 32), (33, 64), (65, 128), (129, 256), (257, 511))
"""First and last position of tokens whose loss is averaged."""
_EARLY, _LATE = (50, 50), (500, 500)
"""The positions of Olsson et al. 2022; single tokens differ much from window to window, so that
bands of them are compared as well."""
_EARLY_BAND, _LATE_BAND = (33, 64), (401, 511)

OnProgress = Callable[[int], object]


def measure_heads(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """How much the loss of repeated random tokens rises without the strongest heads, and without as
    many others of the same layers; the label of a line by the kinds of its words.

    Args:
        chat: the model.
        data: the folder of mini's data.
        num: number of items.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    table = head_table(chat)
    top = table.top(NUM_HEADS)
    plain = repeat_losses(chat, num)
    yield mean_metric("insight/heads, loss of repeated tokens", plain.tolist(), start)
    for name, heads in ((_names(top), top), ("others of the layers", table.controls(top))):
        start = time.perf_counter()
        rise = (repeat_losses(chat, num, heads=heads) - plain).tolist()
        metric = mean_metric(f"insight/heads, rise of that loss without {name}", rise, start)
        if heads is top:
            yield with_threshold(metric, _MIN_RISE)
        else:
            yield with_limit(metric, _MAX_CONTROL_RISE)
    on_progress(num)
    start = time.perf_counter()
    result = template_task(chat)
    yield accuracy_metric("insight/heads, (month)(animal), label", result.correct, start)
    best, chance = result.best(), f"chance {result.chance:.2f}"
    name = f"insight/heads, (month)(animal), attention of {best} on the kind of line, {chance}"
    yield with_threshold(mean_metric(name, result.shares[best], start), _MIN_SHARE)


def measure_text_learning(
    chat: Any, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """The loss of plain text by position, and by how much it is lower late in a window than early;
    with all heads, without the strongest induction heads, and without as many others of the same
    layers.

    Args:
        chat: the model.
        data: the folder of mini's data.
        num: windows of text at most.
        on_progress: called with the number of windows done.
    """
    table, ids = head_table(chat), text_windows(chat, data, num)
    top = table.top(NUM_HEADS)
    conditions = {"": [], f", without {_names(top)}": top}
    conditions[f", without {NUM_HEADS} others"] = table.controls(top)
    plain: dict[str, list[float]] = {}
    for note, heads in conditions.items():
        start = time.perf_counter()
        with ablated(chat, heads):
            losses = token_losses(chat, ids)
        values = {
            f"loss of text at positions {_span(band)}": losses[:, slice(*_columns(band))].mean(1)
            for band in BANDS
        }
        for late, early in ((_LATE, _EARLY), (_LATE_BAND, _EARLY_BAND)):
            name = f"in-context learning, loss at {_span(late)} less {_span(early)}"
            values[name] = in_context_scores(losses, _columns(late), _columns(early))
        for name, value in values.items():
            own = value.tolist()
            yield mean_metric(f"insight/heads/text, {name}{note}", own, start)
            if heads and name.startswith("in-context"):
                change = f"insight/heads/text, change of {name}{note}"
                yield difference_metric(change, own, plain[name], start)
            plain.setdefault(name, own)
    on_progress(num)


def text_windows(chat: Any, data: Path, num: int) -> Tensor:
    """Windows of mini's plain texts, evenly spaced, each behind a start token: int[W, WINDOW].

    Args:
        chat: the model.
        data: the folder of mini's data.
        num: W, at most.
    """
    llm, found = model_of(chat).llm, []
    for file in sorted((data / "text").glob("*.txt")):
        ids = llm.tokenizer(read_text(file), add_special_tokens=False, verbose=False)["input_ids"]
        found += list(torch.tensor(ids).unfold(0, WINDOW - 1, WINDOW - 1))
    num = min(num, len(found))
    rows = torch.stack([found[index * len(found) // num] for index in range(num)])
    return torch.cat([torch.tensor([start_ids(chat)] * len(rows)), rows], dim=1)


def measure_copying(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """The label of a thing that was shown before in another style, take or modality, right of 4;
    without the strongest induction heads of text, and without as many others of their layers.

    Args:
        chat: the model.
        data: the folder of mini's data.
        num: number of items.
        on_progress: called with the number of items done.
    """
    table = head_table(chat)
    top = table.top(NUM_COPYING_HEADS)
    conditions = {
        "": [],
        f", without {NUM_COPYING_HEADS} induction heads": top,
        f", without {NUM_COPYING_HEADS} others": table.controls(top),
    }
    features = FeatureCache(chat.model)
    for pair in PAIRS:
        examples = paired_examples(data, *pair)
        for note, heads in conditions.items():
            if heads and pair not in _ABLATED_PAIRS:
                continue
            start = time.perf_counter()
            correct = copying(chat, examples, num=num, heads=heads, features=features)
            metric = accuracy_metric(f"insight/copying, {'->'.join(pair)}{note}", correct, start)
            if pair in (("image", "image"), ("audio", "audio")):
                is_ablated = heads is top
                metric = (
                    with_limit(metric, _MAX_ABLATED)
                    if is_ablated
                    else with_threshold(metric, _MIN_COPYING)
                )
            yield metric
    on_progress(num)


def paired_examples(data: Path, shown: str, asked: str) -> list[Example]:
    """The concepts of mini's data in two forms.

    Args:
        data: the folder of mini's data.
        shown: "text" or a modality.
        asked: likewise.
    """
    forms = {kind: _forms(data, kind) for kind in (shown, asked)}
    names = sorted(forms[shown].keys() & forms[asked].keys())
    return [Example(name, forms[shown][name][0], forms[asked][name][1]) for name in names]


def _forms(data: Path, kind: str) -> dict[str, tuple[Part, Part]]:
    """Concept, by the name of its picture -> how it is shown, and how it is asked for."""
    if kind == "text":
        concepts = parse_json(read_text(data / "concepts.json"))
        return {c["id"]: (c["label"], c["label"]) for c in concepts if c["split"] == "train"}
    field, first, second = ("style", _SHOWN_STYLE, _ASKED_STYLE)
    names: dict[str, str] = {}
    if kind == "audio":
        field, first, second = ("take", _SHOWN_TAKE, _ASKED_TAKE)
        sounds = parse_json(read_text(data / "sounds.json.gz"))["concepts"]
        names = {sound["id"]: sound.get("picture") or sound["id"] for sound in sounds}
    found: dict[Any, dict[str, Part]] = {first: {}, second: {}}
    for item in read_items(data, kind):
        if item[field] in found and item["split"] != "heldout_concept":
            name = str(names.get(item["concept"], item["concept"]))
            found[item[field]].setdefault(name, open_item(data, item))
    return {
        name: (found[first][name], found[second][name])
        for name in found[first]
        if name in found[second]
    }


def _columns(positions: tuple[int, int]) -> tuple[int, int]:
    """First and last position of tokens -> the columns of their losses, the last not included."""
    return positions[0] - 1, positions[1]


def _span(positions: tuple[int, int]) -> str:
    first, last = positions
    return str(first) if first == last else f"{first} to {last}"


def _names(heads: list[Any]) -> str:
    return " ".join(map(str, heads))
