"""Linear regression as in OPRO (Yang et al. 2023, sec. 3.1): find w and b from values of the loss
alone. The prompts are the paper's."""

from __future__ import annotations

import random
import re

from mmllm.reasoning.search_loop import Evaluation

_NUMBER = r"[-+]?\d{1,6}(?:\.\d+)?"
_PAIR = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_NAMED = re.compile(rf"w\s*=\s*({_NUMBER})\s*,?\s*(?:and\s*)?b\s*=\s*({_NUMBER})")


class LinearRegression:
    """y = w x + b + N(0, 1) at x = 1, …, 50; solved when the true pair of integers is proposed.

    Args:
        w: the true slope.
        b: the true intercept.
        num_points: number of points.
        seed: of the noise.
    """

    LOW, HIGH = -10, 40
    """Range of both numbers in random search."""

    introduction = (
        "Now you will help me minimize a function with two input variables w, b. I have some "
        "(w, b) pairs and the function values at those points. The pairs are arranged in "
        "descending order based on their function values, where lower values are better."
    )
    instruction = (
        "Give me a new (w, b) pair that is different from all pairs above, and has a function "
        "value lower than any of the above. Do not write code. The output must end with a pair "
        "[w, b], where w and b are numerical values."
    )

    def __init__(self, w: int = 15, b: int = 14, *, num_points: int = 50, seed: int = 0):
        self.truth = w, b
        self.name = f"linear regression ({w}, {b})"
        rng = random.Random(seed)
        self.points = [(x, w * x + b + rng.gauss(0, 1)) for x in range(1, num_points + 1)]

    def start(self, rng: random.Random) -> list[tuple[int, int]]:
        """Five pairs, uniform in [10, 20]^2."""
        return [(rng.randint(10, 20), rng.randint(10, 20)) for _ in range(5)]

    def parse(self, text: str) -> tuple[int, int]:
        """The last pair [w, b] in the text, or else the last `w=…, b=…`, rounded."""
        found = _PAIR.findall(text) or _NAMED.findall(text)
        if not found:
            raise ValueError("there is no pair [w, b] in it")
        w, b = found[-1]
        return round(float(w)), round(float(b))

    def show(self, candidate: tuple[int, int]) -> str:
        return f"[{candidate[0]}, {candidate[1]}]"

    def show_evaluated(self, candidate: tuple[int, int], value: float) -> str:
        return f"input:\nw={candidate[0]}, b={candidate[1]}\nvalue:\n{round(value)}"

    def evaluate(self, candidate: tuple[int, int]) -> Evaluation:
        """The sum of squared errors."""
        w, b = candidate
        value = sum((y - w * x - b) ** 2 for x, y in self.points)
        return Evaluation(
            value, candidate == self.truth, f"the value of {candidate} is {value:.0f}"
        )

    def random(self, rng: random.Random) -> tuple[int, int]:
        """A pair uniform in [LOW, HIGH]^2."""
        return rng.randint(self.LOW, self.HIGH), rng.randint(self.LOW, self.HIGH)

    def neighbor(self, candidate: tuple[int, int], rng: random.Random) -> tuple[int, int]:
        """One or both numbers changed by up to 1, 2, 4 or 8."""
        while True:
            reach = rng.choice((1, 2, 4, 8))
            w, b = (number + rng.randint(-reach, reach) for number in candidate)
            if (w, b) != candidate:
                return w, b
