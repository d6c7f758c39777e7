"""What an answer costs by the size of what is asked: a language model, and search with a test.

python demos/constant_time.py runs/constant-time [--model mini] [--questions 50]

Numbers are to be put in order. A model that is asked spends about the same time on each token of
its answer, however hard the instance is, and its accuracy falls; a program that tries and tests
takes longer for larger instances and stays right (the argument of Kambhampati et al. 2024,
arXiv:2402.01817). The folder gets constant-time.json and constant-time.png.
"""

import argparse
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mmllm
from mmllm import console
from mmllm.conversation import user
from mmllm.evaluation.metrics import accuracy_metric
from mmllm.reasoning.models import ChatModel

SIZES = (2, 3, 4, 5, 6, 8, 10)
LARGEST = 99
MAX_SAMPLES = 16
"""Replies that are sampled and tested, at most."""
ROUND = 4
"""Replies of one call."""

Outcome = tuple[bool, int]
"""Whether the right order was found; tokens written, or orders tested by a program."""


def is_ordered(numbers: Sequence[int], answer: Sequence[int]) -> bool:
    """The sound test: the same numbers, none before a smaller one. It does not sort."""
    same = all(numbers.count(number) == answer.count(number) for number in {*numbers, *answer})
    return same and all(left <= right for left, right in itertools.pairwise(answer))


def question(numbers: Sequence[int]) -> list[mmllm.Message]:
    """Ask for the order, with one example of the form."""
    return [
        user(
            "Write numbers from the smallest to the largest.\n"
            f"Numbers: 31, 7, 58\nOrder: 7, 31, 58\nNumbers: {', '.join(map(str, numbers))}\nOrder:"
        )
    ]


def numbers_in(text: str) -> list[int]:
    """The numbers in the first line of a reply."""
    lines = text.removeprefix("Order:").strip().splitlines() or [""]
    return [int(found) for found in re.findall(r"\d+", lines[0])]


def ask(model: ChatModel, numbers: Sequence[int], seed: int) -> Outcome:
    """Ask once, greedily."""
    limit = 5 * len(numbers)
    (written,) = model.complete(question(numbers), temperature=0.0, max_new_tokens=limit)
    return is_ordered(numbers, numbers_in(written.text)), written.completion_tokens


def generate_and_test(model: ChatModel, numbers: Sequence[int], seed: int) -> Outcome:
    """Sample replies until one passes the test."""
    tokens = 0
    for first in range(0, MAX_SAMPLES, ROUND):
        found = model.complete(
            question(numbers),
            n=ROUND,
            temperature=0.7,
            max_new_tokens=5 * len(numbers),
            seed=1000 * seed + first,
        )
        tokens += sum(written.completion_tokens for written in found)
        if any(is_ordered(numbers, numbers_in(written.text)) for written in found):
            return True, tokens
    return False, tokens


def search(model: ChatModel, numbers: Sequence[int], seed: int) -> Outcome:
    """A program without a model: exchange two numbers where that leaves fewer pairs in the wrong
    order, until the test passes."""
    rng = random.Random(seed)
    order, num = list(numbers), 1
    while not is_ordered(numbers, order):
        first, second = sorted(rng.sample(range(len(order)), 2))
        exchanged = [*order]
        exchanged[first], exchanged[second] = order[second], order[first]
        if wrong_pairs(exchanged) < wrong_pairs(order):
            order = exchanged
        num += 1
    return True, num


def wrong_pairs(order: Sequence[int]) -> int:
    """The number of pairs of which the larger number comes first."""
    return sum(left > right for i, left in enumerate(order) for right in order[i + 1 :])


WAYS: dict[str, Callable[[ChatModel, Sequence[int], int], Outcome]] = {
    "asked": ask,
    f"up to {MAX_SAMPLES} replies, tested": generate_and_test,
    "program with the same test": search,
}


def measure(model: ChatModel, sizes: Sequence[int], num: int) -> dict[str, list[dict[str, Any]]]:
    """Way -> for each size: accuracy with its 95 % interval, and means of seconds and tokens (of a
    program: tests) of an answer."""
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for size in sizes:
        instances = [random.Random(seed).sample(range(1, LARGEST + 1), size) for seed in range(num)]
        for way, solve in WAYS.items():
            start = time.perf_counter()
            found = [solve(model, numbers, seed) for seed, numbers in enumerate(instances)]
            seconds = (time.perf_counter() - start) / num
            accuracy = accuracy_metric(way, [right for right, _ in found], start)
            effort = sum(effort for _, effort in found) / num
            results[way].append(
                {
                    "size": size,
                    "accuracy": accuracy.value,
                    "low": accuracy.low,
                    "high": accuracy.high,
                    "seconds": round(seconds, 5),
                    "effort": round(effort, 1),
                }
            )
            console.echo(
                f"{size:3} numbers, {way:28} {accuracy.value:.2f} "
                f"[{accuracy.low:.2f}-{accuracy.high:.2f}] {seconds:8.4f} s {effort:8.1f}"
            )
    return results


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Three panels by size: accuracy, seconds of an answer, and tokens or tests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = dict(zip(("accuracy", "seconds", "effort"), figure.subplots(1, 3), strict=True))
    for way, rows in results.items():
        sizes = [row["size"] for row in rows]
        for quantity, axis in panels.items():
            axis.plot(sizes, [row[quantity] for row in rows], "o-", label=way)
        low, high = ([row[end] for row in rows] for end in ("low", "high"))
        panels["accuracy"].fill_between(sizes, low, high, alpha=0.15)
    panels["accuracy"].set(title="right answers", ylim=(-0.03, 1.03))
    panels["seconds"].set(title="seconds of an answer", yscale="log")
    panels["effort"].set(title="tokens written; of the program: tests", yscale="log")
    for axis in panels.values():
        axis.set_xlabel("numbers to put in order")
    panels["accuracy"].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--questions", type=int, default=50, help="of each size")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    results = measure(mmllm.load(given.model), SIZES, given.questions)
    text = json.dumps(results, indent=1)
    (given.folder / "constant-time.json").write_text(text, encoding="utf-8")
    draw(results, given.folder / "constant-time.png")


if __name__ == "__main__":
    main()
