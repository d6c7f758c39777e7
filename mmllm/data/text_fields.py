"""Text fields of dataset rows: conversion to text, validation, and templates filled from fields."""

from __future__ import annotations

import math
import string
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from mmllm.errors import ConfigError, RowError, quoted
from mmllm.utils.hints import did_you_mean

_FORMATTER = string.Formatter()


def is_nothing(value: Any) -> bool:
    """Return whether a field is missing: None, or NaN, which tables contain for missing values."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def text_of(value: Any, rng: np.random.Generator, what: str) -> str:
    """Convert a field to text.

    Args:
        value: a text, a finite number, a list of them, or a missing value.
        rng: draws one of the entries of a list.
        what: the name of the field, for messages.

    Returns:
        The text; "" for a missing value.

    Raises:
        RowError: a value of another type.
    """
    if isinstance(value, list):
        return _drawn(value, rng, what)
    return _word(value, what)


def caption_of(value: Any, rng: np.random.Generator) -> str:
    """Convert a field to a caption: as `text_of`, with surrounding white space removed.

    Args:
        value: a text, or a list of texts of which one is drawn.
        rng: draws it.

    Raises:
        RowError: the field holds neither.
    """
    return text_of(value, rng, "caption").strip()


def _drawn(values: list[Any], rng: np.random.Generator, what: str) -> str:
    words = [word for value in values if (word := _word(value, what)).strip()]
    return words[int(rng.integers(len(words)))] if words else ""


def _word(value: Any, what: str) -> str:
    if is_nothing(value):
        return ""
    if isinstance(value, str):
        return value
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if number and math.isfinite(value):
        return str(value)
    raise RowError(f"{what}: expected a text, a number or a list of them, got {quoted(value)}")


def check_text(text: Any, what: str) -> None:
    """Raise RowError for a value that is no valid Unicode text: not a text at all, or one with a
    lone surrogate, which also stands for a byte of a file that is not UTF-8.

    Args:
        text: the value.
        what: the name of the field, for messages.
    """
    if not isinstance(text, str):
        raise RowError(f"{what}: expected a text, got {quoted(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = quoted(text[max(error.start - 20, 0) : error.start + 20])
        raise RowError(
            f"{what} is not Unicode at character {error.start}, {near}: half of a surrogate pair, "
            "or a file that is not UTF-8"
        ) from error


class Template:
    """A text with `{names}` of fields in the syntax of `str.format`: `{name}`, `{name:05d}`,
    `{name!r}`. Attributes and items of values cannot be accessed.

    Args:
        text: the template.
        where: its place in the config, for messages.

    Raises:
        ConfigError: the syntax is invalid.
    """

    def __init__(self, text: str, where: str):
        self.text = text
        try:
            self._pieces = list(_FORMATTER.parse(text))
        except ValueError as error:
            raise ConfigError(f"{where}: {text!r}: {error}; write {{{{ for a brace") from error
        for _, name, spec, conversion in self._pieces:
            if name is None:
                continue
            if not name:
                raise ConfigError(f"{where}: {text!r}: {{}} names no field; write {{caption}}")
            if conversion not in (None, "s", "r", "a"):
                raise ConfigError(f"{where}: {text!r}: unknown conversion !{conversion}")
            if spec and not any(_fits(value, spec) for value in ("1", 1, 1.0)):
                raise ConfigError(f"{where}: {text!r}: {name!r} cannot be written as {spec!r}")

    @property
    def names(self) -> list[str]:
        """The names of the fields that are filled in, in order."""
        return list(dict.fromkeys(name for _, name, _, _ in self._pieces if name))

    def check(self, fields: Collection[str], where: str) -> None:
        """Raise ConfigError for a name in braces that no row has as a field.

        Args:
            fields: the fields of all rows.
            where: the template's place in the config, for messages.
        """
        for name in self.names:
            if name not in fields:
                hint = did_you_mean(name, fields)
                raise ConfigError(f"{where}: {self.text!r}: no row has a field {name!r}{hint}")

    def fill(self, row: Mapping[str, Any], rng: np.random.Generator) -> str:
        """Fill in the fields of a row.

        Args:
            row: field -> value.
            rng: draws one of the texts of a field that holds a list.

        Raises:
            RowError: a field is missing, or cannot be formatted as the template requires.
        """
        filled = []
        for literal, name, spec, conversion in self._pieces:
            filled.append(literal)
            if name is None:
                continue
            value = row.get(name)
            if is_nothing(value):
                raise RowError(f"the row has no {name!r}, which {quoted(self.text)} needs")
            word = text_of(value, rng, name)
            value = word if isinstance(value, list) else value
            if conversion:
                filled.append(format(_FORMATTER.convert_field(value, conversion), spec or ""))
            else:
                filled.append(_formatted(value, spec, word, name) if spec else word)
        return "".join(filled)


def _formatted(value: Any, spec: str, word: str, name: str) -> str:
    """Format a value by `spec`; for a numeric format the digits of a text are a number. Raises
    RowError."""
    for convert in (lambda: value, lambda: int(word), lambda: float(word)):
        try:
            return format(convert(), spec)
        except (ValueError, TypeError, OverflowError):
            continue
    raise RowError(f"{name}: {quoted(value)} cannot be written as {spec!r}")


def _fits(value: Any, spec: str) -> bool:
    try:
        format(value, spec)
    except (ValueError, TypeError):
        return False
    return True
