"""Rows of searches: ciphers, plans and the model as an optimizer, each with its control."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmllm.evaluation.metrics import Metric, accuracy_metric, with_threshold
from mmllm.reasoning.baselines import hill_climbing, random_search
from mmllm.reasoning.models import ChatModel
from mmllm.reasoning.problems import Blocksworld, LinearRegression
from mmllm.reasoning.problems.cipher import decode_by_test, decode_directly, encode, matches
from mmllm.reasoning.search_loop import Problem, SearchResult, search

NUM_CIPHERS = 100
NUM_BLOCKSWORLDS = 50
NUM_OPTIMIZATIONS = 10
COMMON_SHIFTS = (1, 3, 13)
"""Shifts that texts on the Internet have (arXiv:2309.13638)."""
MAX_DIRECT = 0.1
"""Accuracy of decoding other shifts by asking, at most: what the papers find."""
MIN_TESTED = 0.95
_SENTENCE = re.compile(r"[A-Z][a-z ,;'-]{20,38}[.!?](?=\s)")

OnProgress = Callable[[int], object]


def measure_cipher(
    model: ChatModel, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """Caesar ciphers of sentences, all 25 shifts in turn: asked directly, and by generate and
    test.

    Args:
        model: what is measured.
        data: folder of mini's data.
        num: number of sentences.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    sentences = sample_sentences((data / "text" / "alice.txt").read_text(encoding="utf-8"), num)
    direct: dict[bool, list[bool]] = {True: [], False: []}
    tested = []
    for number, sentence in enumerate(sentences):
        shift = 1 + number % 25
        ciphertext = encode(sentence, shift)
        decoded = decode_directly(model, ciphertext, shift, max_new_tokens=32)
        direct[shift in COMMON_SHIFTS].append(matches(decoded, sentence))
        tested.append(decode_by_test(model, ciphertext).text == sentence)
        on_progress(1)
    names = ", ".join(map(str, COMMON_SHIFTS))
    metric = accuracy_metric("reasoning/cipher, asked directly", direct[False], start)
    yield replace(metric, threshold=f"<= {MAX_DIRECT}", met=metric.value <= MAX_DIRECT)
    yield accuracy_metric(f"reasoning/cipher, asked directly, shifts {names}", direct[True], start)
    metric = accuracy_metric("reasoning/cipher, generate and test", tested, start)
    yield with_threshold(metric, MIN_TESTED)


def measure_blocksworld(
    model: ChatModel, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """Instances of 3 to 5 blocks: solved with the verifier's critique in 2 calls of 4 plans, and by
    as many random executable plans; and the plans that came out although they were wrong.

    Args:
        model: what is measured.
        data: folder of mini's data.
        num: number of instances.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    solved, wrong, by_chance = [], [], []
    steps, samples = 2, 4
    for number in range(num):
        problem = Blocksworld(3 + number % 3, seed=number)
        result = search(
            model,
            problem,
            strategy="critique",
            steps=steps,
            samples=samples,
            keep=1,
            max_new_tokens=64,
            seed=number,
        )
        solved.append(result.solution is not None)
        if result.solution is not None:
            wrong.append(not problem.evaluate(problem.parse(result.solution)).is_solved)
        by_chance.append(random_search(problem, steps * samples, random.Random(number))[1])
        on_progress(1)
    metric = accuracy_metric("reasoning/blocksworld, wrong plans that came out", wrong, start)
    yield replace(metric, threshold="0", met=not any(wrong))
    yield accuracy_metric("reasoning/blocksworld, solved with a verifier", solved, start)
    yield accuracy_metric("reasoning/blocksworld, solved by random plans", by_chance, start)


def measure_optimizer(
    model: ChatModel, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """The model as the optimizer of a linear regression, (15, 14), in 15 steps of 8 samples; hill
    climbing and random search at as many evaluations of the same instances.

    Args:
        model: what is measured.
        data: folder of mini's data.
        num: number of runs.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    solved, climbed, by_chance = [], [], []
    results = []
    for number in range(num):
        problem = LinearRegression(15, 14, seed=number)
        result = search(model, problem, steps=15, samples=8, max_new_tokens=48, seed=1000 * number)
        results.append(result)
        solved.append(result.solution is not None)
        evaluations = len(result.evaluated)
        climbed.append(_solves(hill_climbing, problem, evaluations, number))
        by_chance.append(_solves(random_search, problem, evaluations, number))
        on_progress(1)
    yield accuracy_metric("reasoning/optimizer, optimum found by the model", solved, start)
    yield accuracy_metric("reasoning/optimizer, optimum found by hill climbing", climbed, start)
    yield accuracy_metric("reasoning/optimizer, optimum found by random search", by_chance, start)
    yield accuracy_metric("reasoning/optimizer, valid answers", _validity(results), start)


def sample_sentences(text: str, num: int, seed: int = 0) -> list[str]:
    """Draw different sentences of 22 to 40 characters, without digits or quotation marks.

    Args:
        text: the text that holds them.
        num: how many, at most.
        seed: of the draw.
    """
    found = sorted(set(_SENTENCE.findall(" ".join(text.split()))))
    return random.Random(seed).sample(found, min(num, len(found)))


def _solves(method: Callable[..., Any], problem: Problem[Any], num: int, seed: int) -> bool:
    return method(problem, num, random.Random(seed))[1]


def _validity(results: Sequence[SearchResult]) -> list[bool]:
    """For each reply of the model, whether it held a candidate."""
    return [
        attempt.value is not None
        for result in results
        for attempt in result.attempts
        if attempt.step
    ]
