"""What datasets share: a file of rows under one root, and the conversations made of them."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mmllm.conversation import MEDIA, Medium
from mmllm.data.tables import Table, UnreadableRow, encoding_of
from mmllm.data.text_fields import check_text
from mmllm.errors import (
    ConfigError,
    MediaError,
    OutsideRootError,
    OversizedMediaError,
    RowError,
    quoted,
)
from mmllm.media import data_uri
from mmllm.utils.hints import did_you_mean
from mmllm.weights import locate

_LONGEST_NAME = 4096
"""Characters of a file's name, as Linux has it."""


class JsonRows(Sequence[dict[str, Any]]):
    """The rows of a JSON file. One that is not an object raises RowError when it is asked for."""

    def __init__(self, entries: Sequence[dict[str, Any] | UnreadableRow]):
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        entry = self._entries[index]
        if isinstance(entry, UnreadableRow):
            raise RowError(entry.reason)
        return entry

    @functools.cached_property
    def whole(self) -> int:
        """How many rows can be read."""
        return sum(isinstance(entry, dict) for entry in self._entries)

    @functools.cached_property
    def columns(self) -> list[str]:
        """Every field that any row has."""
        rows = (entry for entry in self._entries if isinstance(entry, dict))
        return list(dict.fromkeys(key for row in rows for key in row))

    def has(self, column: str) -> bool:
        """Whether any row has this field."""
        return any(isinstance(entry, dict) and column in entry for entry in self._entries)

    def select(self, column: str, values: Sequence[Any]) -> JsonRows:
        """The rows whose `column` has one of the values; one that cannot be read stays, to be
        counted."""
        return JsonRows(
            [e for e in self._entries if isinstance(e, UnreadableRow) or e.get(column) in values]
        )


Rows: TypeAlias = JsonRows | Table
"""What datasets are made of: `rows[i]` is a mapping of fields, or raises RowError."""


def read_rows(file: str, root: str | None, where: str) -> tuple[JsonRows, Path]:
    """Rows of a JSON file, which is a list of objects or has one object a line (its content says
    which), maybe gzipped, and the folder that its media are named from.

    `file` may begin with `mini:data/…`; `root` is the file's folder unless given.
    """
    path = resolve(file)
    if not path.is_file():
        raise ConfigError(f"{where}.file: {file!r} does not exist (looked at {path})")
    try:
        entries = _entries(read_text(path, errors="surrogateescape"))
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{where}.file: {path}: not valid JSON: {error}") from error
    rows = JsonRows(entries)
    if not rows.whole:
        first = f"; the first: {entries[0].reason}" if entries else ""  # pyright: ignore
        raise ConfigError(
            f"{where}.file: {path}: expected a non-empty list of objects, or one a line{first}"
        )
    return rows, resolve(root) if root else path.parent


def open_rows(file: str, root: str | None, where: str) -> tuple[Rows, Path]:
    """As `read_rows`; also .csv, .tsv and .parquet (a pattern may name several), which are tables
    that do not come into memory whole."""
    if Path(file.lower().removesuffix(".gz")).suffix not in (".csv", ".tsv", ".parquet"):
        return read_rows(file, root, where)
    path = resolve(file)
    return Table.open(path, f"{where}.file"), resolve(root) if root else path.parent


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file, unpacked if it is gzipped: UTF-8, or what its byte order mark says.
    `errors` as in `bytes.decode`."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    return data.decode(encoding_of(data), errors)


def write_text(path: Path, text: str) -> None:
    """What `read_text` reads: the same text gives the same bytes."""
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _lines(text: str) -> list[str]:
    """The lines of a JSONL file. Only line feeds and carriage returns end one: what else
    `str.splitlines` takes for an end may stand in JSON as it is."""
    return text.replace("\r", "\n").split("\n")


def _entries(text: str) -> list[dict[str, Any] | UnreadableRow]:
    """The rows of a list, of one object a line, or of one object. Raises ValueError."""
    if not text.strip():
        raise ValueError("the file is empty")
    try:
        found = parse_json(text)
    except ValueError:
        if not _is_by_line(text):
            raise
        numbered = enumerate(_lines(text), 1)
        return [_entry_of_line(line, number) for number, line in numbered if line.strip()]
    rows = found if isinstance(found, list) else [found]
    return [_entry(row, f"row {number}") for number, row in enumerate(rows)]


def _is_by_line(text: str) -> bool:
    """Whether a text that is no JSON as a whole has one value a line: a list that is cut short or
    holds a fault has not."""
    if not text.lstrip().startswith("["):
        return True
    try:
        first = next(line for line in _lines(text) if line.strip())
        parse_json(first)
    except ValueError:
        return False
    return True


def parse_json(text: str) -> Any:
    """The value of a JSON text, in which integers of thousands of digits become floats. Raises
    ValueError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python's limit for the digits of an integer
        return json.loads(text, parse_int=float)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error


def _entry_of_line(line: str, number: int) -> dict[str, Any] | UnreadableRow:
    try:
        return _entry(parse_json(line), f"line {number}")
    except ValueError as error:
        return UnreadableRow(f"line {number}: not valid JSON: {error}")


def _entry(row: Any, what: str) -> dict[str, Any] | UnreadableRow:
    return (
        row
        if isinstance(row, dict)
        else UnreadableRow(f"{what}: expected an object, got {quoted(row)}")
    )


def require(rows: Rows, fields: Sequence[str], where: str) -> None:
    """Raises ConfigError for a field that no row has: the file is of another kind, or its columns
    have other names."""
    for name in fields:
        if not rows.has(name):
            hint = did_you_mean(name, rows.columns)
            raise ConfigError(
                f"{where}: no row has a field {name!r}{hint}; there are {quoted(rows.columns)}"
            )


def select(rows: Rows, where: Mapping[str, Any], place: str) -> Rows:
    """Rows whose fields have the wanted values (a list means any of them)."""
    for key, wanted in where.items():
        rows = rows.select(key, wanted if isinstance(wanted, list) else [wanted])
        if not rows.whole:
            raise ConfigError(f"{place}.where: no row has {key} = {wanted!r}")
    return rows


def medium(modality: str, file: str | None, root: Path, caption: str | None) -> Medium:
    """A medium of a dataset: `file` lies under the dataset's root, or is a data: URI."""
    if modality not in MEDIA:
        raise RowError(f"unknown modality {quoted(modality)}; known are {', '.join(MEDIA)}")
    if file is None:
        return MEDIA[modality](caption=caption)
    if isinstance(file, str) and data_uri.is_data_uri(file):
        return MEDIA[modality](source=from_text(file, modality, data_uri.parse), caption=caption)
    return MEDIA[modality](source=inside(root, file), caption=caption)


def from_text(text: str, where: str, read: Callable[[str, str], bytes]) -> bytes:
    """The bytes of a file that a row holds as text; `read` is a function of mmllm.media.data_uri.
    Raises RowError for what is no such text."""
    try:
        return read(text, where)
    except OversizedMediaError:
        raise
    except MediaError as error:
        raise RowError(str(error)) from error


def inside(root: Path, file: str) -> Path:
    """`file` below `root`, wherever links and `..` lead; raises OutsideRootError for any other,
    RowError for what is no name."""
    if not isinstance(file, str) or not file or "\0" in file:
        raise RowError(f"expected the name of a file, got {quoted(file)}")
    check_text(file, "the name of a file")
    if data_uri.looks_like_base64(file):
        raise RowError(
            f"expected the name of a file, got {quoted(file)}, which looks like base64: write "
            "data:image/jpeg;base64,… (with the type that it has)"
        )
    if len(file) > _LONGEST_NAME:
        raise RowError(f"expected the name of a file, got {len(file)} characters: {quoted(file)}")
    if "://" in file:
        raise OutsideRootError(
            f"{quoted(file)} is no local file: download it below {root} and name it from there"
        )
    path = root / file
    if not path.resolve().is_relative_to(root.resolve()):
        raise OutsideRootError(f"{quoted(file)} lies outside the dataset's root {root}")
    return path


def resolve(name: str) -> Path:
    """A path as configs write it: `mini:data/…` is inside the package."""
    if name.startswith("mini:"):
        head, _, rest = name.partition("/")
        return Path(locate(head, "data")) / rest
    return Path(name).expanduser()
