"""YAML for configs: plain data whose numbers and booleans keep their spelling.

YAML 1.1 reads `no` and `on` as booleans, `1e-4` as text, `010` as eight, `1:30` as ninety and
`2026-01-02` as a date. The type of the config field decides what a scalar means, so a scalar keeps
its spelling (`SpelledScalar`) until it is converted to that type (mmllm.config). Numbers are parsed
as in YAML 1.2 and JSON; dates and sexagesimal numbers stay text; keys are always text.

Documents may come from untrusted sources: size, nesting and aliases are bounded, and no tag creates
an object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

MAX_CHARACTERS = 2**17
"""Maximum length of a document; PyYAML takes seconds for this many."""
_MAX_NODES = 50_000
"""Maximum number of nodes of a document, aliases expanded."""

_BOOLEANS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
_DECIMAL = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INTEGER = re.compile(
    r"[-+]?(?:0|[1-9][0-9_]*)$|[-+]?0x[0-9a-fA-F_]+$|[-+]?0b[01_]+$|[-+]?0o[0-7_]+$"
)
_BOOLEAN = re.compile("|".join(f"{w}$|{w.title()}$|{w.upper()}$" for w in _BOOLEANS))


class SpelledScalar:
    """A YAML scalar that is not text: `spelling` as it is in the document, `plain` as YAML reads
    it."""

    spelling: str
    plain: Any

    def __repr__(self) -> str:
        return self.spelling


class _Boolean(SpelledScalar, int):
    @property
    def plain(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self)


class _Integer(SpelledScalar, int):
    @property
    def plain(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return int(self)


class _Float(SpelledScalar, float):
    @property
    def plain(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return float(self)


def without_spelling(tree: Any) -> Any:
    """Return the same data with every `SpelledScalar` replaced by its plain value."""
    if isinstance(tree, SpelledScalar):
        return tree.plain
    if isinstance(tree, Mapping):
        return {key: without_spelling(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(without_spelling(value) for value in tree)
    return tree


def load(text: str) -> Any:
    """Parse a YAML document into plain data and `SpelledScalar`.

    Args:
        text: one document.

    Returns:
        Dictionaries, lists, texts, None and `SpelledScalar`.

    Raises:
        ValueError: the text is no valid YAML, has duplicate keys, or exceeds the bounds.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def dump(tree: Any) -> str:
    """Return YAML that both `load` and other YAML readers parse to the same plain data."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars that the module docstring describes."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value[:60]!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
                if key.tag != "tag:yaml.org,2002:merge":
                    key.tag = "tag:yaml.org,2002:str"
        return node


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes texts which YAML 1.1 or this module would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _resolved(node: yaml.ScalarNode, kind: type, value: Any) -> Any:
    scalar = kind(value)
    scalar.spelling = node.value
    return scalar


def _integer(loader: _Loader, node: yaml.ScalarNode) -> Any:
    try:
        return _resolved(node, _Integer, int(node.value.replace("_", ""), 0))
    except ValueError:  # `!!int text`, or more digits than Python converts
        return node.value


def _float(loader: _Loader, node: yaml.ScalarNode) -> Any:
    digits = node.value.replace("_", "").lower()
    try:
        return _resolved(node, _Float, float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", digits)))
    except ValueError:
        return node.value


def _boolean(loader: _Loader, node: yaml.ScalarNode) -> Any:
    value = _BOOLEANS.get(node.value.lower())
    return node.value if value is None else _resolved(node, _Boolean, value)


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of nodes in a tree, aliases expanded. Raises ValueError above the bound."""
    known = counts.get(id(node))
    if known is not None:
        if known == 0:
            raise ValueError("an alias that contains itself")
        return known
    counts[id(node)] = 0  # marks a node that is being counted
    total = 1
    if not isinstance(node, yaml.ScalarNode):
        for entry in node.value:
            for child in entry if isinstance(entry, tuple) else (entry,):
                total += _count(child, counts)
                if total > _MAX_NODES:
                    raise ValueError(f"more than {_MAX_NODES} entries when aliases are written out")
    counts[id(node)] = total
    return total


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", _BOOLEAN, "yYnNtTfFoO"),
    ("int", _INTEGER, "-+0123456789"),
    ("float", _DECIMAL, "-+0123456789."),
    ("null", re.compile(r"~$|null$|Null$|NULL$|$"), ["~", "n", "N", ""]),
    ("merge", re.compile("<<$"), "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
}
_Loader.add_constructor("tag:yaml.org,2002:bool", _boolean)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
