"""Random access to the rows of CSV, TSV and Parquet files, without holding media in memory.

A text file is loaded as an Arrow table of bytes ("001312382" is not converted to a number); each
row is decoded as UTF-8 when it is accessed. A Parquet file is read one row group at a time, with
the last groups cached; shuffled access needs small groups, as `datasets` writes them.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmllm.errors import ConfigError, MediaError, RowError, quoted
from mmllm.media import Embedded

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import csv

GROUP_BYTES = 512 * 2**20
"""Maximum size of a row group."""
_LONGEST_ROW = 2**30
"""Maximum bytes of a row of a text file."""
_LONGEST_HEADER = 2**16
"""Bytes at the beginning of a text file from which its delimiter is detected."""


@dataclass(frozen=True)
class UnreadableRow:
    """A row that cannot be read, and the reason."""

    reason: str


def encoding_of(data: bytes) -> str:
    """Return the encoding of a text file by its first bytes: that of its byte order mark, or UTF-8.
    Decoding removes the mark."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


class Table(Sequence[dict[str, Any]]):
    """The rows of one or several files: `table[i]` is {column: value}.

    Bytes in a row, at any depth, become Embedded: references that read the bytes again when they
    are needed. Unreadable rows come last; access to one raises RowError.

    Args:
        name: the file or the pattern.
        columns: column names.
        pieces: Arrow tables in memory, or (file, number) of row groups on disk.
        sizes: number of rows of each piece.
        broken: the unreadable rows.
        kept: int[N], indices of the selected rows; None selects all.
    """

    def __init__(
        self,
        name: str,
        columns: list[str],
        pieces: Sequence[pyarrow.Table | tuple[str, int]],
        sizes: Sequence[int],
        broken: Sequence[UnreadableRow] = (),
        kept: np.ndarray | None = None,
    ):
        self.name = name
        self.columns = columns
        self._pieces = list(pieces)
        self._ends = np.cumsum(sizes, dtype=np.int64)  # cumulative numbers of rows
        self._broken = broken
        self._kept = kept

    @classmethod
    def open(cls, path: Path, where: str, header: Sequence[str] = ()) -> Table:
        """Open a file, or all files that match a pattern.

        Args:
            path: a .csv, .tsv or .parquet file, or a pattern such as `train-*.parquet`.
            where: the dataset's place in the config, for messages.
            header: column names of a text file that has no header.

        Raises:
            ConfigError: no such file, no rows, a file that cannot be read, or files with different
                columns.
        """
        paths = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not paths:
            raise ConfigError(f"{where}: {path} does not exist")
        import pyarrow

        pieces: list[Any] = []
        sizes: list[int] = []
        columns: list[str] = []
        broken: list[UnreadableRow] = []
        for file in paths:
            try:
                if file.suffix.lower() == ".parquet":
                    names, groups = _row_groups(file, where)
                    pieces += [(str(file), number) for number in range(len(groups))]
                    sizes += groups
                else:
                    text, faults = _read_text(file, header)
                    names = text.column_names
                    pieces.append(text)
                    sizes.append(len(text))
                    broken += faults
            except ConfigError:
                raise
            except (pyarrow.ArrowException, OSError, ValueError, EOFError, zlib.error) as error:
                raise ConfigError(f"{where}: {file} cannot be read: {error}") from error
            twice = [name for name in names if name and names.count(name) > 1]
            if twice:
                raise ConfigError(f"{where}: {file} has two columns {twice[0]!r}; rename one")
            if columns and sorted(names) != sorted(columns):
                raise ConfigError(
                    f"{where}: {file} has columns {names}, {paths[0].name} has {columns}"
                )
            columns = columns or names
        if not sum(sizes):
            first = f"; the first: {broken[0].reason}" if broken else ""
            raise ConfigError(f"{where}: {path}: no rows{first}")
        return cls(str(path), columns, pieces, sizes, broken)

    def __len__(self) -> int:
        return self.whole + len(self._broken)

    @property
    def whole(self) -> int:
        """The number of rows that can be read."""
        return int(self._ends[-1]) if self._kept is None else len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        if index >= self.whole:
            raise RowError(self._broken[index - self.whole].reason)
        row = int(index if self._kept is None else self._kept[index])
        return self._named(self._row(row), row, ())

    def has(self, column: str) -> bool:
        """Return whether the rows have this column."""
        return column in self.columns

    def select(self, column: str, values: Sequence[Any]) -> Table:
        """Return the rows with one of the given values in a column.

        In a text file values are compared as texts. Unreadable rows are kept, so that they are
        counted.

        Args:
            column: the column's name.
            values: the values to keep.

        Raises:
            ConfigError: there is no such column.
        """
        if column not in self.columns:
            raise ConfigError(f"no column {column!r}; there are {', '.join(self.columns)}")
        as_text = [str(value).encode() for value in values]
        found = []
        for number, piece in enumerate(self._pieces):
            on_disk = isinstance(piece, tuple)
            part = _group(*piece, column) if on_disk else self._piece(number)
            own = part.column(column).to_pylist()
            wanted = values if on_disk else as_text
            found.append(np.array([value in wanted for value in own], dtype=bool))
        kept = np.flatnonzero(np.concatenate(found))
        if self._kept is not None:
            kept = np.intersect1d(kept, self._kept)
        sizes = np.diff(self._ends, prepend=0).tolist()
        return Table(self.name, self.columns, self._pieces, sizes, self._broken, kept)

    def _row(self, row: int) -> dict[str, Any]:
        """Return a row of the unselected table, with bytes as they are. Raises RowError."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        found = self._piece(number).slice(row - start, 1).to_pylist()[0]
        return found if isinstance(self._pieces[number], tuple) else _decoded(found)

    def _named(self, value: Any, row: int, place: tuple[str | int, ...]) -> Any:
        """Replace bytes in a value by Embedded; `place` is the path of the value in the row."""
        if isinstance(value, bytes):
            name = f"{self.name}:{row}:{'.'.join(map(str, place))}"
            return Embedded(name, functools.partial(self._bytes, row, place))
        if isinstance(value, dict):
            return {key: self._named(entry, row, (*place, key)) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._named(entry, row, (*place, i)) for i, entry in enumerate(value)]
        return value

    def _bytes(self, row: int, place: tuple[str | int, ...]) -> bytes:
        import pyarrow

        try:
            value: Any = self._row(row)
        except (pyarrow.ArrowException, OSError) as error:
            raise MediaError(f"{self.name}:{row} cannot be read: {error}") from error
        for key in place:
            value = value[key]
        return value

    def _piece(self, number: int) -> pyarrow.Table:
        piece = self._pieces[number]
        return _group(*piece) if isinstance(piece, tuple) else piece


def _row_groups(path: Path, where: str) -> tuple[list[str], list[int]]:
    """Return the column names of a Parquet file, and the number of rows of each row group."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > GROUP_BYTES:
            raise ConfigError(
                f"{where}: {path}: a row group of {largest / 2**20:.0f} MiB, and "
                f"{GROUP_BYTES // 2**20} are read at once; write the file again with smaller ones "
                "(pyarrow.parquet.write_table(table, path, row_group_size=100))"
            )
        return file.schema_arrow.names, [group.num_rows for group in groups]


@functools.lru_cache(maxsize=2)
def _group(path: str, number: int, column: str | None = None) -> pyarrow.Table:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(number, columns=[column] if column else None)


def _decoded(row: dict[str, bytes]) -> dict[str, str]:
    """Decode a row of a text file. Raises RowError for bytes that are not UTF-8."""
    texts = {}
    for column, value in row.items():
        try:
            texts[column] = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(
                f"column {column!r}: {quoted(value)} is not UTF-8 (byte 0x{value[error.start]:02x})"
                "; write the file again in it (iconv -f latin1 -t utf-8)"
            ) from error
    return texts


def _read_text(path: Path, header: Sequence[str]) -> tuple[pyarrow.Table, list[UnreadableRow]]:
    """Read a text file: its rows, and those whose number of fields differs from the first row's."""
    import pyarrow

    try:  # multithreaded; fails at a row with another number of fields
        return _read_csv(path, header), []
    except pyarrow.ArrowInvalid:
        return _read_odd_csv(path, header)


def _read_csv(path: Path, header: Sequence[str]) -> pyarrow.Table:
    """Read a text file as columns of bytes. Raises ArrowInvalid for rows of different lengths."""
    encoding = _encoding(path)
    return _read_columns(
        lambda: contextlib.nullcontext(path),
        _parse_options(path, header),
        column_names=list(header) or None,
        encoding="utf8" if encoding == "utf-8-sig" else encoding,
    )


def _read_odd_csv(path: Path, header: Sequence[str]) -> tuple[pyarrow.Table, list[UnreadableRow]]:
    """As `_read_csv`, but slower and tolerant: rows of another number of fields are returned
    separately, and the file is read as one block, so that a row may be long."""
    broken: dict[int, UnreadableRow] = {}
    encoding = _encoding(path)
    as_latin = encoding == "utf-8-sig"  # Latin-1 decodes any bytes, so every row can be quoted

    def skip(row: Any) -> str:
        number = row.number - (0 if header else 1)  # the first line holds the column names
        text = _bytes_of(row.text).decode("utf-8", "backslashreplace") if as_latin else row.text
        what = f"row {number}: {row.expected_columns} fields expected, {row.actual_columns} found"
        broken[number] = UnreadableRow(f"{what}: {quoted(text)}")
        return "skip"

    size = _LONGEST_ROW if _is_packed(path) else min(path.stat().st_size + 1, _LONGEST_ROW)
    table = _read_columns(
        lambda: _opened(path),
        _parse_options(path, header, skip),
        column_names=list(header) or None,
        encoding="latin-1" if as_latin else encoding,
        use_threads=False,
        block_size=size,
    )
    return _from_latin(table, header) if as_latin else table, list(broken.values())


def _read_columns(
    opened: Callable[[], AbstractContextManager[Any]], parsing: csv.ParseOptions, **reading: Any
) -> pyarrow.Table:
    """Read all columns of a text file as bytes; `reading` are arguments of pyarrow ReadOptions."""
    import pyarrow
    from pyarrow import csv

    options = csv.ReadOptions(**reading)
    unchecked = csv.ConvertOptions(check_utf8=False)
    with (
        opened() as file,
        csv.open_csv(
            file, read_options=options, parse_options=parsing, convert_options=unchecked
        ) as stream,
    ):
        names = stream.schema.names
    as_bytes = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.binary()))
    with opened() as file:
        return csv.read_csv(
            file, read_options=options, parse_options=parsing, convert_options=as_bytes
        )


def _from_latin(table: pyarrow.Table, header: Sequence[str]) -> pyarrow.Table:
    """Convert the table of a file that was read as Latin-1 back to the file's bytes."""
    import pyarrow

    columns = [
        pyarrow.array([_bytes_of(cell.decode("utf-8")) for cell in column.to_pylist()], "binary")
        for column in table.columns
    ]
    names = header or [_bytes_of(name).decode("utf-8") for name in table.column_names]
    return pyarrow.table(columns, names=list(names))


def _bytes_of(text: str) -> bytes:
    return text.encode("latin-1")


def _parse_options(
    path: Path, header: Sequence[str], skip: Callable[[Any], str] | None = None
) -> csv.ParseOptions:
    from pyarrow import csv

    usual = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    mark = usual if header else _delimiter(path, usual)
    tabbed = usual == mark == "\t"
    return csv.ParseOptions(
        delimiter=mark,
        quote_char=False if tabbed else '"',  # in TSV files a quotation mark is text
        newlines_in_values=not tabbed,
        invalid_row_handler=skip,
    )


def _delimiter(path: Path, usual: str) -> str:
    """Detect the delimiter in the header: `usual`, or else a semicolon (which spreadsheets write
    into CSV in locales with a decimal comma), a tab or a comma."""
    with gzip.open(path) if _is_packed(path) else path.open("rb") as file:
        head = file.read(_LONGEST_HEADER)
    names = re.split(r"[\r\n]", head.decode(encoding_of(head), "replace"), maxsplit=1)[0]
    names = re.sub(r'"[^"]*"', "", names)
    return next((mark for mark in (usual, ";", "\t", ",") if mark in names), usual)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file that may be gzipped, positioned after a UTF-8 byte order mark."""
    with gzip.open(path) if _is_packed(path) else path.open("rb") as file:
        file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
        yield file


def _encoding(path: Path) -> str:
    with gzip.open(path) if _is_packed(path) else path.open("rb") as file:
        return encoding_of(file.read(4))


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"
