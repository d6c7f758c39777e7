"""Rows of CSV, TSV and Parquet files by number, without holding media in memory.

A text file becomes an Arrow table of strings ("001312382" stays what it is). Of Parquet one row
group is read at a time and the last ones are kept; who shuffles wants small groups, as `datasets`
writes them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmllm.conversation import Embedded
from mmllm.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

GROUP_BYTES = 512 * 2**20
"""The largest row group that is read."""


class Table(Sequence[dict[str, Any]]):
    """`table[i]` -> {column: value}. Pieces are Arrow tables in memory or row groups on disk.

    Bytes in a row, at any depth, are Embedded: named, and read again when they are needed.
    """

    def __init__(
        self,
        name: str,
        columns: list[str],
        pieces: Sequence[pyarrow.Table | tuple[str, int]],
        sizes: Sequence[int],
        kept: np.ndarray | None = None,
    ):
        self.name = name  # of the file or the pattern
        self.columns = columns
        self._pieces = list(pieces)
        self._ends = np.cumsum(sizes)  # pieces' ends, in rows
        self._kept = kept  # int[N]: rows that `select` left, None for all

    @classmethod
    def open(cls, path: Path, where: str, header: Sequence[str] = ()) -> Table:
        """A file, or all that a pattern (`train-*.parquet`) names. `header`: the columns of a text
        file that does not name them. Raises ConfigError."""
        paths = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not paths:
            raise ConfigError(f"{where}: {path} does not exist")
        import pyarrow

        pieces: list[Any] = []
        sizes: list[int] = []
        columns: list[str] = []
        for file in paths:
            try:
                if file.suffix == ".parquet":
                    names, groups = _row_groups(file, where)
                    pieces += [(str(file), number) for number in range(len(groups))]
                    sizes += groups
                else:
                    text = _read_text(file, header)
                    names = text.column_names
                    pieces.append(text)
                    sizes.append(len(text))
            except (pyarrow.ArrowException, OSError) as error:
                raise ConfigError(f"{where}: {file} cannot be read: {error}") from error
            if columns and names != columns:
                raise ConfigError(
                    f"{where}: {file} has columns {names}, {paths[0].name} has {columns}"
                )
            columns = names
        if not sum(sizes):
            raise ConfigError(f"{where}: {path}: no rows")
        return cls(str(path), columns, pieces, sizes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._kept is None else len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        row = int(index if self._kept is None else self._kept[index])
        return self._named(self._row(row), row, ())

    def select(self, column: str, values: Sequence[Any]) -> Table:
        """The rows whose `column` has one of the values (texts of a text file match as texts)."""
        if column not in self.columns:
            raise ConfigError(f"no column {column!r}; there are {', '.join(self.columns)}")
        found = []
        for number, piece in enumerate(self._pieces):
            part = self._piece(number) if not isinstance(piece, tuple) else _group(*piece, column)
            own = part.column(column).to_pylist()
            wanted = set(values if isinstance(piece, tuple) else map(str, values))
            found.append(np.array([value in wanted for value in own], dtype=bool))
        kept = np.flatnonzero(np.concatenate(found))
        if self._kept is not None:
            kept = np.intersect1d(kept, self._kept)
        sizes = np.diff(self._ends, prepend=0).tolist()
        return Table(self.name, self.columns, self._pieces, sizes, kept)

    def _row(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return self._piece(number).slice(row - start, 1).to_pylist()[0]

    def _named(self, value: Any, row: int, place: tuple[str | int, ...]) -> Any:
        if isinstance(value, bytes):
            name = f"{self.name}:{row}:{'.'.join(map(str, place))}"
            return Embedded(name, functools.partial(self._bytes, row, place))
        if isinstance(value, dict):
            return {key: self._named(entry, row, (*place, key)) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._named(entry, row, (*place, i)) for i, entry in enumerate(value)]
        return value

    def _bytes(self, row: int, place: tuple[str | int, ...]) -> bytes:
        value: Any = self._row(row)
        for key in place:
            value = value[key]
        return value

    def _piece(self, number: int) -> pyarrow.Table:
        piece = self._pieces[number]
        return _group(*piece) if isinstance(piece, tuple) else piece


def _row_groups(path: Path, where: str) -> tuple[list[str], list[int]]:
    """Column names and the rows of each group."""
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


def _read_text(path: Path, header: Sequence[str]) -> pyarrow.Table:
    import pyarrow
    from pyarrow import csv

    tabs = ".tsv" in path.suffixes
    parsing = csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char=False if tabs else '"',  # in tabbed files a quotation mark is text
        newlines_in_values=not tabs,
    )
    reading = csv.ReadOptions(column_names=list(header) or None)
    with csv.open_csv(path, read_options=reading, parse_options=parsing) as stream:
        names = stream.schema.names
    strings = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    return csv.read_csv(path, read_options=reading, parse_options=parsing, convert_options=strings)
