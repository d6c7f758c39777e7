"""Arithmetic with a calculator: the model writes expressions, and exact arithmetic checks them.

The calculator reads +, -, *, / and brackets by a grammar of its own; nothing is ever executed.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from mmllm.errors import ConfigError
from mmllm.reasoning.search_loop import Evaluation

_MAX_CHARACTERS = 120
_TOKEN = re.compile(r"\s*(\d{1,12}(?:\.\d{1,12})?|[-+*/()])")
_SIGNS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "x": "*"})
"""Typographic signs and what they mean: times, dot, division, minus."""
_BRACKET = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Calculation:
    """An expression and its exact value; `numbers` are those in it, in order."""

    expression: str
    value: Fraction
    numbers: tuple[Fraction, ...]


def calculate(expression: str) -> Calculation:
    """Compute an expression of numbers, +, -, *, / and round brackets exactly.

    Raises:
        ValueError: it is no such expression, is longer than 120 characters, or divides by 0.

    Example:
        >>> calculate("2 * (3 + 4) / 7").value
        Fraction(2, 1)
    """
    if len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"the expression is longer than {_MAX_CHARACTERS} characters")
    text = expression.translate(_SIGNS).strip()
    tokens: list[str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"{text[place]!r} cannot be part of an expression")
        tokens.append(match[1])
        place = match.end()
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.tokens:
        raise ValueError(f"{parser.tokens[0]!r} is not expected there")
    numbers = tuple(Fraction(token) for token in tokens if token[0].isdigit())
    return Calculation(" ".join(tokens), value, numbers)


class _Parser:
    """Recursive descent; at most 120 tokens, so that recursion is bounded."""

    def __init__(self, tokens: list[str]):
        self.tokens = list(tokens)

    def sum(self) -> Fraction:
        value = self.product()
        while self.tokens and self.tokens[0] in "+-":
            sign = self.tokens.pop(0)
            other = self.product()
            value = value + other if sign == "+" else value - other
        return value

    def product(self) -> Fraction:
        value = self.factor()
        while self.tokens and self.tokens[0] in "*/":
            sign = self.tokens.pop(0)
            other = self.factor()
            if sign == "/" and other == 0:
                raise ValueError("it divides by 0")
            value = value * other if sign == "*" else value / other
        return value

    def factor(self) -> Fraction:
        if not self.tokens:
            raise ValueError("the expression ends where a number is expected")
        token = self.tokens.pop(0)
        if token == "-":
            return -self.factor()
        if token == "(":
            value = self.sum()
            if not self.tokens or self.tokens.pop(0) != ")":
                raise ValueError("a bracket is not closed")
            return value
        if not token[0].isdigit():
            raise ValueError(f"{token!r} is not expected there")
        return Fraction(token)


class Arithmetic:
    """The numbers game: an expression that uses each given number once and has a given value.

    Args:
        num_numbers: from 2 to 6 numbers of 1 to 10.
        seed: of the numbers and of the expression that gives the target, a whole number from 1 to
            100.
    """

    def __init__(self, num_numbers: int = 4, *, seed: int = 0):
        if not 2 <= num_numbers <= 6:
            raise ConfigError(f"arithmetic: expected 2 to 6 numbers, got {num_numbers}")
        rng = random.Random(seed)
        while True:
            self.numbers = tuple(rng.randint(1, 10) for _ in range(num_numbers))
            value = calculate(self.random(rng)).value
            if value.denominator == 1 and 1 <= value <= 100:
                break
        self.target = int(value)
        self.name = f"arithmetic, {num_numbers} numbers"
        numbers = ", ".join(map(str, self.numbers))
        self.introduction = (
            f"Here are the numbers {numbers}. Write an expression that uses each of them exactly "
            f"once, with +, -, *, / and brackets, and has the value {self.target}. Expressions so "
            "far and their values, the best ones last:"
        )
        self.instruction = (
            f"Give a new expression with the value {self.target}. Write it in square brackets, "
            "like [(1 + 2) * 3]."
        )

    def start(self, rng: random.Random) -> list[str]:
        """Three random expressions."""
        return [self.random(rng) for _ in range(3)]

    def parse(self, text: str) -> str:
        """The last expression in square brackets; it must use each number once."""
        found = _BRACKET.findall(text)
        if not found:
            raise ValueError("there is no expression in square brackets")
        calculation = calculate(found[-1])
        if Counter(calculation.numbers) != Counter(map(Fraction, self.numbers)):
            raise ValueError(
                f"{calculation.expression} does not use each of {list(self.numbers)} exactly once"
            )
        return calculation.expression

    def show(self, candidate: str) -> str:
        return f"[{candidate}]"

    def show_evaluated(self, candidate: str, value: float) -> str:
        return f"[{candidate}] = {_decimal(calculate(candidate).value)}"

    def evaluate(self, candidate: str) -> Evaluation:
        """The distance of its exact value from the target."""
        value = calculate(candidate).value
        critique = f"{candidate} = {_decimal(value)}, not {self.target}"
        distance = abs(value - self.target)
        return Evaluation(float(distance), distance == 0, critique)

    def random(self, rng: random.Random) -> str:
        """A random expression of all numbers."""
        terms = list(map(str, self.numbers))
        while len(terms) > 1:
            one = terms.pop(rng.randrange(len(terms)))
            other = terms.pop(rng.randrange(len(terms)))
            try:
                term = calculate(f"({one} {rng.choice('+-*/')} {other})").expression
            except ValueError:  # division by 0
                term = f"( {one} + {other} )"
            terms.append(term)
        return calculate(terms[0]).expression

    def neighbor(self, candidate: str, rng: random.Random) -> str:
        """One operator changed, or two numbers exchanged."""
        tokens = candidate.split()
        while True:
            changed = list(tokens)
            if rng.random() < 0.5:
                places = [i for i, token in enumerate(tokens) if token in "+-*/"]
                changed[rng.choice(places)] = rng.choice("+-*/")
            else:
                places = [i for i, token in enumerate(tokens) if token[0].isdigit()]
                one, other = rng.sample(places, 2)
                changed[one], changed[other] = changed[other], changed[one]
            try:
                return calculate(" ".join(changed)).expression
            except ValueError:  # division by 0
                continue


def _decimal(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{float(value):.4g}"
