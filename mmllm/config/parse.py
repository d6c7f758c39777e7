"""Plain data -> dataclasses, every key and every type checked, and back."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mmllm.errors import ConfigError, quoted
from mmllm.utils import literals
from mmllm.utils.literals import SpelledScalar

T = TypeVar("T")


def parse(cls: type[T], tree: Any, where: str) -> T:
    """Build a dataclass from plain data.

    Args:
        cls: the dataclass.
        tree: mapping from the names of its fields to plain data.
        where: names the data in errors.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    tree = as_mapping(tree, where)
    check_keys(cls, tree, where)
    hints = _hints(cls)
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_keys(cls: type, tree: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for an unknown key, or a missing one.

    Args:
        cls: the dataclass; a field without a default is required.
        tree: its mapping in the YAML.
        where: the mapping's place in the config, for messages.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(cls) if entry.init}
    for key in tree:
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key {quoted(key)}{suggest(key, fields)}; "
                f"known are {', '.join(sorted(fields))}"
            )
    missing = [
        name
        for name, entry in fields.items()
        if name not in tree
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(map(repr, missing))}")


def suggest(key: Any, known: Any) -> str:
    """Return "; did you mean …?" with the nearest known name, or "" if none is near.

    Args:
        key: the unknown name.
        known: the known names.

    Example:
        >>> suggest("wieghts", ["weights", "layer"])
        "; did you mean 'weights'?"
    """
    near = difflib.get_close_matches(str(key)[:60], list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def as_mapping(tree: Any, where: str) -> Mapping[str, Any]:
    """Return a value unchanged if it is a mapping.

    Args:
        tree: plain data from YAML.
        where: its place in the config, for messages.

    Raises:
        ConfigError: it is no mapping.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys, got {quoted(tree)}")
    return tree


def _value(hint: Any, value: Any, where: str) -> Any:
    """Validate the value of one field: nested dataclasses by `parse`, all others by pydantic."""
    options = _options(hint)
    nested = [option for option in options if dataclasses.is_dataclass(option)]
    if nested and not dataclasses.is_dataclass(value):
        if value is None and type(None) in options:
            return None
        return parse(typing.cast(type, nested[0]), value, where)
    import pydantic

    value = _resolve_scalars(hint, value)
    try:
        validated = _adapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *(str(key)[:60] for key in first["loc"])])
        remedy = {
            bool: "; YAML reads yes, no, on and off as true and false: put quotes round a text",
            type(None): "; YAML reads null, ~ and nothing as no value: put quotes round a text",
        }.get(type(first["input"]), "")
        raise ConfigError(
            f"{place}: {first['msg'].lower()}, got {quoted(first['input'])}{remedy}"
        ) from error
    if _holds_nan(validated):
        raise ConfigError(f"{where}: expected a number, got nan")
    return validated


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; a tuple of the type itself if it is none."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _resolve_scalars(hint: Any, value: Any) -> Any:
    """Replace every `SpelledScalar` scalar by the value that the type of its field asks for."""
    options = _options(hint)
    if isinstance(value, SpelledScalar):
        return _resolve_scalar(options, value)
    if isinstance(value, Mapping | list | tuple):
        for option in options:
            args = typing.get_args(option)
            origin = typing.get_origin(option)
            if isinstance(value, Mapping) and origin in (Mapping, dict) and len(args) == 2:
                return {key: _resolve_scalars(args[1], entry) for key, entry in value.items()}
            if not isinstance(value, Mapping) and origin in (tuple, list, Sequence) and args:
                repeated = [args[0]] * len(value)
                hints = repeated if args[-1] is ... else [*args, *repeated]
                return [
                    _resolve_scalars(kind, entry) for kind, entry in zip(hints, value, strict=False)
                ]
    return literals.without_spelling(value)


def _resolve_scalar(options: Sequence[Any], value: SpelledScalar) -> Any:
    """The spelling where a `Literal` or a text is asked for, else the number or boolean."""
    choices = [
        choice
        for option in options
        if typing.get_origin(option) is typing.Literal
        for choice in typing.get_args(option)
    ]
    for spelling in (value.spelling, value.spelling.lower()):
        if spelling in choices:
            return spelling
    if any(choice == value.plain and type(choice) is type(value.plain) for choice in choices):
        return value.plain
    accepted = {bool: (bool,), int: (int, float, bool), float: (float, int)}[type(value.plain)]
    if any(option is Any or option in accepted for option in options):
        return value.plain
    return value.spelling


def _holds_nan(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_nan(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_nan(entry) for entry in value)
    return isinstance(value, float) and math.isnan(value)


@functools.cache
def _adapter(hint: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
