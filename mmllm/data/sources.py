"""What datasets share: a file of rows under one root, and the conversations made of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from mmllm.conversation import MEDIA, Medium, Message
from mmllm.data.tables import Table
from mmllm.errors import ConfigError, MediaError, OutsideRootError, RowError
from mmllm.weights import locate

Rows: TypeAlias = list[dict[str, Any]] | Table
"""What datasets are made of: `rows[i]` is a mapping of fields."""


class Source(Protocol):
    """A dataset: numbered conversations. `rng` decides what may vary from visit to visit."""

    share: float

    def __len__(self) -> int: ...

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """Conversation `index`; media are named, not opened. Raises MediaError."""
        ...

    def name(self, index: int) -> str:
        """What a report calls this item."""
        ...


def read_rows(file: str, root: str | None, where: str) -> tuple[list[dict[str, Any]], Path]:
    """Rows of a .json (a list) or .jsonl file, or one of them gzipped (.gz), and the folder that
    its media are named from.

    `file` may begin with `mini:data/…`; `root` is the file's folder unless given.
    """
    path = resolve(file)
    if not path.is_file():
        raise ConfigError(f"{where}.file: {file!r} does not exist (looked at {path})")
    try:
        text = read_text(path)
        if ".jsonl" in path.suffixes:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ConfigError(f"{where}.file: {path}: not valid JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{where}.file: {path}: expected a non-empty list of objects")
    return rows, resolve(root) if root else path.parent


def open_rows(file: str, root: str | None, where: str) -> tuple[Rows, Path]:
    """As `read_rows`; also .csv, .tsv and .parquet (a pattern may name several), which are tables
    that do not come into memory whole."""
    if Path(file.removesuffix(".gz")).suffix not in (".csv", ".tsv", ".parquet"):
        return read_rows(file, root, where)
    path = resolve(file)
    return Table.open(path, f"{where}.file"), resolve(root) if root else path.parent


def read_text(path: Path) -> str:
    """A UTF-8 file, unpacked if its name ends in .gz."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def write_text(path: Path, text: str) -> None:
    """What `read_text` reads: the same text gives the same bytes."""
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def select(rows: Rows, where: Mapping[str, Any], place: str) -> Rows:
    """Rows whose fields have the wanted values (a list means any of them)."""
    for key, wanted in where.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        if isinstance(rows, Table):
            rows = rows.select(key, values)
        else:
            rows = [row for row in rows if row.get(key) in values]
        if not rows:
            raise ConfigError(f"{place}.where: no row has {key} = {wanted!r}")
    return rows


def medium(modality: str, file: str | None, root: Path, caption: str | None) -> Medium:
    """A medium of a dataset; its file must lie under the dataset's root."""
    if modality not in MEDIA:
        raise MediaError(f"unknown modality {modality!r}; known are {', '.join(MEDIA)}")
    if file is None:
        return MEDIA[modality](caption=caption)
    return MEDIA[modality](source=inside(root, file), caption=caption)


def inside(root: Path, file: str) -> Path:
    """`file` below `root`, wherever links and `..` lead; raises OutsideRootError for any other,
    RowError for what is no name."""
    if not isinstance(file, str) or not file or "\0" in file:
        raise RowError(f"expected the name of a file, got {file!r}")
    if "://" in file:
        raise OutsideRootError(
            f"{file!r} is no local file: download it below {root} and name it from there"
        )
    path = root / file
    if not path.resolve().is_relative_to(root.resolve()):
        raise OutsideRootError(f"{file!r} lies outside the dataset's root {root}")
    return path


def resolve(name: str) -> Path:
    """A path as configs write it: `mini:data/…` is inside the package."""
    if name.startswith("mini:"):
        head, _, rest = name.partition("/")
        return Path(locate(head, "data")) / rest
    return Path(name).expanduser()
