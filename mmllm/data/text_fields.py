"""Words out of a row's fields: what counts as a text, and templates that fields are filled into."""

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
    """Whether a field is left out: None, or NaN, which tables are written with for it."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def text_of(value: Any, rng: np.random.Generator, what: str) -> str:
    """The words of a field: a text, the digits of a finite number, or one of a list, which is
    drawn; nothing is the empty text. Raises RowError for anything else; `what` names the field."""
    if isinstance(value, list):
        return _drawn(value, rng, what)
    return _word(value, what)


def caption_of(value: Any, rng: np.random.Generator) -> str:
    """The caption of a row or a medium, as `text_of`, without the blanks around it."""
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
    """Raises RowError for what is no Unicode text: half a surrogate pair, or a byte that is not
    UTF-8 and was read as one."""
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
    """A text with `{names}` of fields, as `str.format` writes them: `{name}`, `{name:05d}`,
    `{name!r}`. A name is looked up as it stands; nothing of a value can be reached by it."""

    def __init__(self, text: str, where: str):
        """Raises ConfigError for what can be filled in for no row."""
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
        """The fields that it takes, in order."""
        return list(dict.fromkeys(name for _, name, _, _ in self._pieces if name))

    def check(self, fields: Collection[str], where: str) -> None:
        """Raises ConfigError for a name that is not among the fields that any row has."""
        for name in self.names:
            if name not in fields:
                hint = did_you_mean(name, fields)
                raise ConfigError(f"{where}: {self.text!r}: no row has a field {name!r}{hint}")

    def fill(self, row: Mapping[str, Any], rng: np.random.Generator) -> str:
        """The text with a row's fields in it. Raises RowError for a field that is not there or
        cannot be written so."""
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
    """By the format; the digits of a text file count as a number for one of numbers."""
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
