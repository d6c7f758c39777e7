"""Messages stay short, whatever they quote."""

from __future__ import annotations

import pytest

from mmllm.errors import quoted


def test_short_values_are_quoted_whole() -> None:
    assert quoted("a\nb") == "'a\\nb'"
    assert quoted({"a": [1, 2]}) == "{'a': [1, 2]}"


def nested(depth: int) -> list:
    inner: list = []
    for _ in range(depth):
        inner = [inner] * 10  # shared, as aliases in YAML are: 10 ** depth when written out
    return inner


@pytest.mark.parametrize(
    "value", ["x" * 10**6, ["y" * 50] * 10**6, nested(60), {"k" * 500: 1}, b"z" * 999]
)
def test_long_values_are_cut(value: object) -> None:
    assert len(quoted(value)) <= 120


def test_integers_that_python_does_not_write_out_are_quoted() -> None:
    assert quoted(-(2**40)) == "-1099511627776"
    assert quoted(10**8400) == "an integer of about 8400 digits"
    assert "about 8400 digits" in quoted({"width": [-(10**8400)]})
