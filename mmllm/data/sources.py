"""Shared code of dataset readers: files of rows, and media below the dataset's root folder."""

# Values of users are checked at run time, whatever the annotation.
# pyright: reportUnnecessaryIsInstance=false
from __future__ import annotations

import functools
import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

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
"""Maximum length of a file name, as on Linux (PATH_MAX)."""


class JsonRows(Sequence[dict[str, Any]]):
    """The rows of a JSON file. Access to a row that is not an object raises RowError."""

    def __init__(self, entries: Sequence[dict[str, Any] | UnreadableRow]):
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        entry = cast("dict[str, Any] | UnreadableRow", self._entries[index])
        if isinstance(entry, UnreadableRow):
            raise RowError(entry.reason)
        return entry

    @functools.cached_property
    def whole(self) -> int:
        """The number of rows that can be read."""
        return sum(isinstance(entry, dict) for entry in self._entries)

    @functools.cached_property
    def columns(self) -> list[str]:
        """The fields of all rows, in order of appearance."""
        rows = (entry for entry in self._entries if isinstance(entry, dict))
        return list(dict.fromkeys(key for row in rows for key in row))

    def has(self, column: str) -> bool:
        """Return whether any row has this field."""
        return any(isinstance(entry, dict) and column in entry for entry in self._entries)

    def select(self, column: str, values: Sequence[Any]) -> JsonRows:
        """Return the rows with one of the given values in a column.

        Unreadable rows are kept, so that they are counted.

        Args:
            column: a field of the rows; a row without it counts as None.
            values: the values to keep.
        """
        return JsonRows(
            [e for e in self._entries if isinstance(e, UnreadableRow) or e.get(column) in values]
        )


Rows: TypeAlias = JsonRows | Table
"""The rows of a dataset: `rows[i]` is a mapping of fields, or raises RowError."""


def read_rows(file: str, root: str | None, where: str) -> tuple[JsonRows, Path]:
    """Read the rows of a JSON or JSONL file, which may be gzipped.

    The content decides between a list of objects and one object per line.

    Args:
        file: the path; it may begin with `mini:data/…`.
        root: the folder of the media; None: the folder of the file.
        where: the dataset's place in the config, for messages.

    Returns:
        The rows, and the root folder of the media.

    Raises:
        ConfigError: the file does not exist or holds no rows.
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
    """Open the rows of a dataset in JSON, JSON Lines, CSV, TSV or Parquet.

    Args:
        file: the file, which may be gzipped where it is text; for tables also a pattern that names
            several files.
        root: the folder that media are relative to; None: that of the file.
        where: the dataset's place in the config, for messages.

    Returns:
        The rows, and the root.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    if Path(file.lower().removesuffix(".gz")).suffix not in (".csv", ".tsv", ".parquet"):
        return read_rows(file, root, where)
    path = resolve(file)
    return Table.open(path, f"{where}.file"), resolve(root) if root else path.parent


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file in UTF-8, or in the encoding of its byte order mark.

    Args:
        path: the file, which may be gzipped, whatever its name.
        errors: what is done with invalid bytes, as in `bytes.decode`.

    Raises:
        OSError: the file cannot be read.
        EOFError, zlib.error: its gzip stream is truncated or damaged.
        UnicodeDecodeError: it holds invalid bytes and `errors` is "strict".
    """
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    return data.decode(encoding_of(data), errors)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8; equal texts give equal bytes.

    Args:
        path: the file, gzipped if its suffix is .gz.
        text: the contents.
    """
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _lines(text: str) -> list[str]:
    """Split a JSONL text into lines. Only line feeds and carriage returns end a line: the other
    separators of `str.splitlines` may occur inside JSON texts."""
    return text.replace("\r", "\n").split("\n")


def _entries(text: str) -> list[dict[str, Any] | UnreadableRow]:
    """Parse a JSON list, one object per line, or a single object into rows. Raises ValueError."""
    if not text.strip():
        raise ValueError("the file is empty")
    try:
        found = parse_json(text)
    except ValueError:
        if not _is_by_line(text):
            raise
        numbered = enumerate(_lines(text), 1)
        return [_entry_of_line(line, number) for number, line in numbered if line.strip()]
    rows = cast("list[Any]", found) if isinstance(found, list) else [found]
    return [_entry(row, f"row {number}") for number, row in enumerate(rows)]


def _is_by_line(text: str) -> bool:
    """Return whether a text that is not valid JSON as a whole has one value per line. A damaged
    JSON list has not."""
    if not text.lstrip().startswith("["):
        return True
    try:
        first = next(line for line in _lines(text) if line.strip())
        parse_json(first)
    except ValueError:
        return False
    return True


def parse_json(text: str) -> Any:
    """Parse a JSON text; integers of thousands of digits become floats. Raises ValueError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer has more digits than Python converts
        return json.loads(text, parse_int=float)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error


def _entry_of_line(line: str, number: int) -> dict[str, Any] | UnreadableRow:
    try:
        return _entry(parse_json(line), f"line {number}")
    except ValueError as error:
        return UnreadableRow(f"line {number}: not valid JSON: {error}")


def _entry(row: Any, what: str) -> dict[str, Any] | UnreadableRow:
    if isinstance(row, dict):
        return cast("dict[str, Any]", row)
    return UnreadableRow(f"{what}: expected an object, got {quoted(row)}")


def require(rows: Rows, fields: Sequence[str], where: str) -> None:
    """Raise ConfigError for a field that no row has.

    The file then has another format, or its columns have other names; the message suggests the
    nearest one.

    Args:
        rows: the rows of the dataset.
        fields: the names that its format needs.
        where: the dataset's place in the config, for messages.
    """
    for name in fields:
        if not rows.has(name):
            hint = did_you_mean(name, rows.columns)
            raise ConfigError(
                f"{where}: no row has a field {name!r}{hint}; there are {quoted(rows.columns)}"
            )


def select(rows: Rows, where: Mapping[str, Any], place: str) -> Rows:
    """Return the rows whose fields have the wanted values.

    Args:
        rows: the rows.
        where: field -> value, or a list of allowed values.
        place: the dataset's place in the config, for messages.

    Raises:
        ConfigError: no row has such a value.
    """
    for key, wanted in where.items():
        values = cast("list[Any]", wanted) if isinstance(wanted, list) else [wanted]
        rows = rows.select(key, values)
        if not rows.whole:
            raise ConfigError(f"{place}.where: no row has {key} = {wanted!r}")
    return rows


def medium(modality: str, file: str | None, root: Path, caption: str | None) -> Medium:
    """Create a medium of a dataset; no file is opened.

    Args:
        modality: "image", "audio" or "video".
        file: a path below `root`, or a data: URI; None for a medium that is only a caption.
        root: the root folder of the dataset.
        caption: the caption of the medium.

    Raises:
        RowError: an unknown modality, or no valid file name or data: URI.
        OutsideRootError: the file is outside `root`.
    """
    if modality not in MEDIA:
        raise RowError(f"unknown modality {quoted(modality)}; known are {', '.join(MEDIA)}")
    if file is None:
        return MEDIA[modality](caption=caption)
    if isinstance(file, str) and data_uri.is_data_uri(file):
        return MEDIA[modality](source=from_text(file, modality, data_uri.parse), caption=caption)
    return MEDIA[modality](source=inside(root, file), caption=caption)


def from_text(text: str, where: str, read: Callable[[str, str], bytes]) -> bytes:
    """Decode a file that a row holds as text.

    Args:
        text: a data: URI or base64.
        where: the field, for messages.
        read: `parse` or `decode` of mmllm.media.data_uri.

    Raises:
        RowError: the text is no such encoding.
        OversizedMediaError: the file exceeds the limits.
    """
    try:
        return read(text, where)
    except OversizedMediaError:
        raise
    except MediaError as error:
        raise RowError(str(error)) from error


def inside(root: Path, file: str) -> Path:
    """Return the path of a file below a dataset's root.

    Args:
        root: the folder that media are relative to.
        file: the file name in a row, relative to `root`.

    Raises:
        RowError: `file` is no valid file name.
        OutsideRootError: `file` is a URL, or lies outside `root` once links and `..` are resolved.
    """
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
    """Return a path of a config: `mini:data/…` is inside the package, `~` is the home folder."""
    if name.startswith("mini:"):
        head, _, rest = name.partition("/")
        return Path(locate(head, "data")) / rest
    return Path(name).expanduser()
