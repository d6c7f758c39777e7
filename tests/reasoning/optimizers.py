"""Scripted optimizers of known rule: they know of a problem only what its prompt shows."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise

STEPS = (1, 2, 4)


def descend(text: str, rng: random.Random) -> str:
    """Linear regression: from the best pair one step along one axis, or from the second-best pair
    beyond the best one."""
    pairs = [(int(w), int(b)) for w, b in re.findall(r"w=(-?\d+), b=(-?\d+)", text)]
    (w1, b1), (w, b) = pairs[-2:]
    if rng.random() < 0.1:
        return f"[{2 * w - w1}, {2 * b - b1}]"
    move, other = (rng.choice(STEPS) * rng.choice((-1, 1)) for _ in range(2))
    changed = rng.choice([(w + move, b), (w, b + move), (w, b + move), (w + move, b + other)])
    return f"I suggest [{changed[0]}, {changed[1]}]."


def shorten(text: str, rng: random.Random) -> str:
    """Travelling salesman: one of the best five traces, sometimes shuffled in part, with the one
    change that shortens it most: a part reversed (2-opt), or a point moved."""
    points = {
        int(index): (int(x), int(y))
        for index, x, y in re.findall(r"\((\d+)\): \((-?\d+), (-?\d+)\)", text)
    }
    traces = re.findall(r"<trace> ([\d,]+) </trace>\nlength", text)
    tour = [int(node) for node in rng.choice(traces[-5:]).split(",")]
    if rng.random() < 0.5:
        one, other = sorted(rng.sample(range(len(tour)), 2))
        tour[one:other] = rng.sample(tour[one:other], other - one)

    def length(nodes: list[int]) -> float:
        return sum(math.dist(points[a], points[b]) for a, b in pairwise([*nodes, nodes[0]]))

    changes = []
    for start in range(len(tour)):
        for end in range(start + 1, len(tour) + 1):
            changes.append([*tour[:start], *reversed(tour[start:end]), *tour[end:]])
            rest = [*tour[:start], *tour[start + 1 :]]
            changes.append([*rest[: end - 1], tour[start], *rest[end - 1 :]])
    return f"<trace> {','.join(map(str, min(changes, key=length)))} </trace>"
