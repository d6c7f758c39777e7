"""The travelling salesman problem as in OPRO (Yang et al. 2023, sec. 3.2), with the optimum by
dynamic programming (Held and Karp 1962) for up to 12 nodes. The prompts are the paper's."""

from __future__ import annotations

import math
import random
import re
from functools import cached_property

from mmllm.errors import ConfigError
from mmllm.reasoning.search_loop import Evaluation

MAX_EXACT = 12
"""Nodes up to which the optimum is computed."""
_TRACE = re.compile(r"<trace>(.*?)(?:</trace>|$)", re.DOTALL)
Tour = tuple[int, ...]


class TravellingSalesman:
    """The shortest closed tour through points; solved when its length is the optimum's.

    Args:
        num_nodes: number of points, at least 3; integers uniform in [-100, 100]^2.
        seed: of the points.
    """

    instruction = (
        "Give me a new trace that is different from all traces above, and has a length lower than "
        "any of the above. The trace should traverse all points exactly once. The trace should "
        "start with <trace> and end with </trace>."
    )

    def __init__(self, num_nodes: int = 10, *, seed: int = 0):
        if num_nodes < 3:
            raise ConfigError(f"salesman: expected at least 3 nodes, got {num_nodes}")
        rng = random.Random(seed)
        self.points = [(rng.randint(-100, 100), rng.randint(-100, 100)) for _ in range(num_nodes)]
        self.name = f"travelling salesman, {num_nodes} nodes"
        points = " ".join(f"({index}): {point}" for index, point in enumerate(self.points))
        self.introduction = (
            f"You are given a list of points with coordinates below: {points}. Below are some "
            "previous traces and their lengths. The traces are arranged in descending order based "
            "on their lengths, where lower values are better."
        )

    def start(self, rng: random.Random) -> list[Tour]:
        """Five random tours."""
        return [self.random(rng) for _ in range(5)]

    def parse(self, text: str) -> Tour:
        """The last trace in the text; the tour is turned to begin at point 0."""
        found = _TRACE.findall(text)
        if not found:
            raise ValueError("there is no <trace> in it")
        nodes = [int(number) for number in re.findall(r"\d{1,6}", found[-1])]
        missing = sorted(set(range(len(self.points))) - set(nodes))
        if missing:
            raise ValueError(f"the trace misses the points {missing}")
        if len(nodes) != len(self.points):
            raise ValueError("the trace has points twice, or such as do not exist")
        start = nodes.index(0)
        return (*nodes[start:], *nodes[:start])

    def show(self, candidate: Tour) -> str:
        return f"<trace> {','.join(map(str, candidate))} </trace>"

    def show_evaluated(self, candidate: Tour, value: float) -> str:
        return f"{self.show(candidate)}\nlength:\n{value:.0f}"

    def length(self, tour: Tour) -> float:
        """The length of a closed tour."""
        return sum(
            math.dist(self.points[one], self.points[other])
            for one, other in zip(tour, (*tour[1:], tour[0]), strict=True)
        )

    def evaluate(self, candidate: Tour) -> Evaluation:
        """Its length."""
        value = self.length(candidate)
        is_solved = self.optimum is not None and value <= self.optimum + 1e-6
        return Evaluation(value, is_solved, f"the length is {value:.0f}")

    def random(self, rng: random.Random) -> Tour:
        """A random tour."""
        rest = list(range(1, len(self.points)))
        rng.shuffle(rest)
        return (0, *rest)

    def neighbor(self, candidate: Tour, rng: random.Random) -> Tour:
        """The tour with one part reversed (2-opt), or with one point moved."""
        one, other = sorted(rng.sample(range(1, len(candidate) + 1), 2))
        if rng.random() < 0.5:
            return (*candidate[:one], *reversed(candidate[one:other]), *candidate[other:])
        rest = list(candidate)
        rest.insert(rng.randrange(1, len(rest)), rest.pop(one))
        return tuple(rest)

    @cached_property
    def optimum(self) -> float | None:
        """The length of the shortest tour; None for more than MAX_EXACT nodes."""
        num = len(self.points)
        if num > MAX_EXACT:
            return None
        distance = [[math.dist(one, other) for other in self.points] for one in self.points]
        others = range(1, num)
        # (set of visited nodes as bits, last node) -> length of the shortest path from node 0
        paths = {(1 << node, node): distance[0][node] for node in others}
        for _ in range(num - 2):
            longer: dict[tuple[int, int], float] = {}
            for (visited, last), length in paths.items():
                for node in others:
                    if not visited & 1 << node:
                        key = visited | 1 << node, node
                        total = length + distance[last][node]
                        longer[key] = min(total, longer.get(key, math.inf))
            paths = longer
        return min(length + distance[last][0] for (_, last), length in paths.items())
