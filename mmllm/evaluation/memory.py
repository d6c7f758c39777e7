"""The row `insight/memory`: what a model loses that reads only parts of a long text, and what it
gains (mmllm.llm.retrieval).

Legend: T positions, D width.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.evaluation.metrics import Metric, accuracy_metric, with_threshold

OnProgress = Callable[[int], object]

READ = {
    2_048: {"window": 64, "block": 32, "blocks": 12},
    8_192: {"window": 128, "block": 32, "blocks": 16},
}
"""Length of a text -> what of it is read: at most 30 % and 10 % of the keys."""
MAX_SHARE = {2_048: 0.30, 8_192: 0.10}
MAX_RATIO, MAX_TIME_RATIO, MIN_RECALL = 1.05, 1.3, 0.8
PIECE = 16
"""Tokens that are read together where perplexity is measured."""
DISTANCE = 20_000
"""Tokens between a name and the question for it."""
RECALL = {"window": 256, "block": 32, "blocks": 32}
NAMES = (
    *("Oliver", "Martin", "Alice", "Peter", "Sarah", "David", "Emma", "Thomas"),
    *("Laura", "Henry", "Simon", "Helen", "Frank", "Julia", "Robert", "Maria"),
)
OWNERS = (
    *("baker", "doctor", "farmer", "painter", "teacher", "sailor", "miller", "singer", "driver"),
    *("lawyer", "writer", "gardener", "hunter", "barber", "butcher", "pilot", "nurse", "judge"),
    *("tailor", "dancer", "fisherman", "soldier", "priest", "shepherd", "plumber"),
)
TIMED = (2_048, 4_096, 8_192, 16_384, 32_768)
"""Positions kept, at which the time of a token is measured."""


@dataclass
class Reading:
    """A text that was read.

    Attributes:
        cache: its key-value cache.
        states: float[T', D], the hidden states of its last positions.
        share: the share of the keys that each of these read, on average.
    """

    cache: Any
    states: Tensor
    share: float


@torch.inference_mode()
def read_text(llm: Any, ids: Tensor, start: int, piece: int, **memory: int) -> Reading:
    """Read a text as a reply would be written: what lies before `start` in long pieces, the rest in
    short ones.

    Args:
        llm: the language model.
        ids: int[T].
        start: where the short pieces begin.
        piece: their length.
        **memory: options of `llm.memory`; none: everything is read.
    """
    cache, states, shares = llm.new_cache(**memory), [], []
    embeds = llm.embed(ids[None].to(llm.embedding.weight.device))
    positions = torch.arange(len(ids), device=embeds.device)[None]
    long = cache.chunk_length or 512
    begins = [*range(0, start, long), *range(start, len(ids), piece)]
    for first, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        part = slice(first, end)
        hidden = llm(embeds[:, part], positions=positions[:, part], cache=cache)[0]
        if first >= start:
            states.append(hidden)
            shares.append(getattr(cache.layers[0], "num_read", end) / end)
    return Reading(cache, torch.cat(states), sum(shares) / len(shares))


def measure_memory(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """Perplexity, recall and time of a model that reads parts of what came before.

    Args:
        chat: the model.
        data: the folder of mini's data.
        num: names that are asked for, and the most windows of a text.
        on_progress: takes the number of names that were asked for.
    """
    llm = chat.model.llm
    texts = [_ids(llm, data / "text" / name) for name in ("alice.txt", "python.txt")]
    for length in READ:
        yield from _perplexity(llm, texts, length, num)
    yield from _recall(llm, texts[0], num, on_progress)
    yield _time_per_token(llm)


def _ids(llm: Any, path: Path) -> Tensor:
    text = path.read_text(encoding="utf-8")
    return torch.tensor(llm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _perplexity(llm: Any, texts: Sequence[Tensor], length: int, num: int) -> Iterator[Metric]:
    """Perplexity of the second half of each window, against that with all keys."""
    start = time.perf_counter()
    windows = [window for text in texts for window in text.split(length) if len(window) == length]
    windows = windows[:: max(1, len(windows) // min(num, 8))]
    differences, shares = [], []
    for window in windows:
        nll = []
        for memory in ({}, READ[length]):
            reading = read_text(llm, window, length // 2, PIECE, **memory)
            targets = window[length // 2 + 1 :].to(reading.states.device)
            nll.append(llm.token_nll(reading.states[:-1], targets).double().cpu())
            shares.append(reading.share)
        differences.append(nll[1] - nll[0])
    difference = torch.cat(differences)
    mean, half = difference.mean(), 1.96 * difference.std() / math.sqrt(len(difference))
    seconds = round(time.perf_counter() - start, 2)
    share = sum(shares[1::2]) / len(windows)
    name = f"insight/memory, perplexity at {length}"
    yield Metric(
        f"{name}, ratio to that with all keys",
        len(difference),
        math.exp(mean),
        math.exp(mean - half),
        math.exp(mean + half),
        f"<= {MAX_RATIO}",
        math.exp(mean) <= MAX_RATIO,
        seconds,
    )
    limit = MAX_SHARE[length]
    yield Metric(
        f"{name}, keys read", len(windows), share, threshold=f"<= {limit}", met=share <= limit
    )


def _recall(llm: Any, text: Tensor, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """Names among 16 that stood 20,000 tokens ago; the same if only the window is read, and if the
    sentences stand just before the question."""
    start = time.perf_counter()
    found: dict[str, list[bool]] = {"memory": [], "the window alone": [], "just before": []}
    for first in range(0, num, len(OWNERS)):
        facts = _facts(llm, seed=first)[: num - first]
        planted, ends = _plant(text, [ids for ids, _, _ in facts], seed=first)
        near = torch.cat([ids for ids, _, _ in facts])
        read = {
            "memory": (planted, RECALL),
            "the window alone": (planted[-2_048:], {}),
            "just before": (near, {}),
        }
        readings = {
            name: read_text(llm, ids, len(ids) - 1, 1, **options).cache
            for name, (ids, options) in read.items()
        }
        assert len(planted) - max(ends) >= DISTANCE
        for _, question, right in facts:
            for name, cache in readings.items():
                found[name].append(_choose(llm, cache, question) == right)
            on_progress(1)
    name = f"insight/memory, name {DISTANCE} tokens ago"
    yield with_threshold(accuracy_metric(name, found.pop("memory"), start), MIN_RECALL)
    for control, right in found.items():
        yield replace(accuracy_metric(f"{name}, {control}", right, start), seconds=0.0)


def _facts(llm: Any, seed: int) -> list[tuple[Tensor, Tensor, str]]:
    """Sentences with a name, the beginning of each as the question, and the name."""
    draw = random.Random(seed)
    facts = []
    for owner in draw.sample(OWNERS, len(OWNERS)):
        name, question = draw.choice(NAMES), f"\n\nThe secret name of the {owner}'s dog is"
        whole, asked = (
            torch.tensor(llm.tokenizer(words, add_special_tokens=False)["input_ids"])
            for words in (f"{question} {name}.\n\n", question)
        )
        facts.append((whole, asked, name))
    return facts


def _plant(text: Tensor, facts: Sequence[Tensor], seed: int) -> tuple[Tensor, list[int]]:
    """Put sentences between pieces of 80 tokens of a text, which goes on for `DISTANCE` tokens: the
    whole, and where each sentence ends."""
    shift = random.Random(seed).randrange(len(text))
    text = text.roll(-shift).repeat(1 + (DISTANCE + 100 * len(facts)) // len(text))
    parts, ends, used, length = [], [], 0, 0
    for fact in facts:
        parts += [text[used : used + 80], fact]
        used, length = used + 80, length + 80 + len(fact)
        ends.append(length)
    parts.append(text[used : used + DISTANCE])
    return torch.cat(parts), ends


@torch.inference_mode()
def _choose(llm: Any, cache: Any, question: Tensor) -> str:
    """The likeliest name after a question behind what a cache holds; names are compared by their
    first tokens."""
    length = cache.get_seq_length()
    positions = torch.arange(length, length + len(question))[None]
    device = llm.embedding.weight.device
    embeds = llm.embed(question[None].to(device))
    states = llm(embeds, positions=positions.to(device), cache=cache.prefix(length))
    logits = llm.head(states[0, -1:])[0]
    firsts = [llm.tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in NAMES]
    return NAMES[int(logits[torch.tensor(firsts, device=device)].argmax())]


@torch.inference_mode()
def _time_per_token(llm: Any, repeats: int = 5) -> Metric:
    """CPU time of a token with 32k positions kept over that with 2k, by the median of several; the
    keys are random, which costs the same."""
    start = time.perf_counter()
    embeds = llm.embed(torch.zeros(1, 1, dtype=torch.long, device=llm.embedding.weight.device))
    medians = []
    for kept in TIMED:
        cache = llm.new_cache(**RECALL)
        llm(embeds, positions=torch.zeros_like(embeds[..., 0]).long(), cache=cache)
        for layer in cache.layers:
            _, heads, _, width = layer.keys.shape
            layer.replace(*(torch.randn(2, 1, heads, kept, width).to(embeds)))
        seconds = []
        for step in range(repeats + 1):
            positions = torch.full((1, 1), kept + step, device=embeds.device)
            before = time.process_time()
            llm(embeds, positions=positions, cache=cache)
            seconds.append(time.process_time() - before)
        medians.append(sorted(seconds[1:])[repeats // 2])
    ratio = max(medians) / medians[0]
    return Metric(
        "insight/memory, time of a token, 2k to 32k kept, largest ratio",
        repeats * len(TIMED),
        ratio,
        threshold=f"<= {MAX_TIME_RATIO}",
        met=ratio <= MAX_TIME_RATIO,
        seconds=round(time.perf_counter() - start, 2),
    )
