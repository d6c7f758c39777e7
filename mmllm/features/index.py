"""A table of records on disk that are found by name; nothing of it stays in memory.

    length and CRC-32 of the head | JSON head | starts and CRC-32s of buckets | records by hash

Names are hashed to 128 bits, whose first bits are the bucket: a look-up reads where it starts and
ends, and then its few records, which must have its checksum. A file is written whole or not at all,
and made again from what it tells of when that has changed, or when it is damaged. Files are read,
not mapped, so they count as nobody's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.errors import CacheError
from mmllm.utils import files

SUFFIX = ".index"
_BUCKET = 16
"""Records of a bucket, about."""
_HEAD = 12
"""Bytes before the JSON head: eight of its length, four of its checksum."""
_EDGE = np.dtype([("start", "<u8"), ("checksum", "<u4")])
_FORMAT = 2
"""Part of an index's name, so that those of other formats are not looked at."""


class Index:
    """`index[name]`: the records of a name. `about`: what the writer told of the whole."""

    def __init__(self, path: Path):
        """Raises OSError or ValueError for a file that is none, or is not whole."""
        self.path = path
        self._file = path.open("rb", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        first = self._read(0, _HEAD)
        length = int.from_bytes(first[:8], "little")
        text = self._read(_HEAD, min(length, size))
        if zlib.crc32(text) != int.from_bytes(first[8:], "little") or len(text) != length:
            raise ValueError(f"{path} is damaged")
        head = json.loads(text)
        self.about: dict[str, Any] = head["about"]
        self.type = np.dtype([tuple(entry) for entry in head["type"]])
        self._bits: int = head["bits"]
        self._edges = _HEAD + length
        self._records = self._edges + _EDGE.itemsize * (2**self._bits + 1)
        self.count: int = head["count"]
        if size != self._records + self.count * self.type.itemsize:
            raise ValueError(f"{path} is not whole")

    def __getitem__(self, name: str) -> np.ndarray:
        """Raises OSError or ValueError where the file is damaged."""
        high, low = hash_of(name)
        bucket = high >> (64 - self._bits) if self._bits else 0
        edges = self._read(self._edges + _EDGE.itemsize * bucket, 2 * _EDGE.itemsize)
        (start, checksum), (stop, _) = np.frombuffer(edges, dtype=_EDGE).tolist()
        size = self.type.itemsize
        whole = start <= stop <= self.count
        data = self._read(self._records + start * size, (stop - start) * size) if whole else b""
        if not whole or _checksum(start, data) != checksum:
            raise ValueError(f"{self.path} is damaged")
        found = np.frombuffer(data, dtype=self.type)
        return found[(found["high"] == high) & (found["low"] == low)]

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        """Data workers that do not inherit the open file open it again."""
        return Index, (self.path,)

    def _read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)


def hash_of(name: str) -> tuple[int, int]:
    """128 bits in two numbers."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def records(
    names: Sequence[str], fields: Mapping[str, tuple[str, Sequence[Any] | np.ndarray]]
) -> np.ndarray:
    """Records of names, with fields {name: (numpy type, a value a record)}."""
    kinds = {name: kind for name, (kind, _) in fields.items()}
    found = np.empty(len(names), dtype=[("high", "<u8"), ("low", "<u8"), *kinds.items()])
    hashes = np.array([hash_of(name) for name in names], dtype="<u8").reshape(-1, 2)
    found["high"], found["low"] = hashes[:, 0], hashes[:, 1]
    for name, (_, values) in fields.items():
        found[name] = values
    return found


def write(path: Path, parts: Iterable[np.ndarray], about: Mapping[str, Any]) -> None:
    """An index of records of one type; the file appears when it is whole. Raises OSError."""
    table = np.concatenate(list(parts))
    table = table[np.lexsort((table["low"], table["high"]))]
    bits = max(len(table) // _BUCKET, 1).bit_length() - 1
    edges = np.arange(1, 2**bits, dtype="<u8") << np.uint64(64 - bits) if bits else []
    inner = np.searchsorted(table["high"], np.asarray(edges, dtype="<u8"))
    starts = np.concatenate([[0], inner, [len(table)]]).astype("<u8")
    size = table.dtype.itemsize
    data = memoryview(table.tobytes())
    buckets = np.zeros(len(starts), dtype=_EDGE)
    buckets["start"] = starts
    places = starts.tolist()
    buckets["checksum"][:-1] = [
        _checksum(start, data[start * size : stop * size])
        for start, stop in itertools.pairwise(places)
    ]
    kind = [list(entry) for entry in table.dtype.descr]
    head = json.dumps({"about": about, "type": kind, "bits": bits, "count": len(table)}).encode()
    first = len(head).to_bytes(8, "little") + zlib.crc32(head).to_bytes(4, "little")
    with files.atomic_file(path) as draft, draft.open("wb") as stream:
        for piece in (first, head, buckets.tobytes(), data):
            stream.write(piece)


def _checksum(start: int, records: bytes | memoryview) -> int:
    """Of a bucket's records and of where they start."""
    return zlib.crc32(records, start & 0xFFFFFFFF)


def name_of(paths: Iterable[Path]) -> str:
    """What an index of these files is called: another name when one is added, gone or changed in
    size."""
    facts = sorted(f"{path.name}:{path.stat().st_size}" for path in paths)
    text = "\n".join([f"format {_FORMAT}", *facts])
    return hashlib.sha256(text.encode()).hexdigest()[:32] + SUFFIX


def open_index(
    folder: Path,
    paths: set[Path],
    read: Callable[[list[Path]], tuple[list[np.ndarray], dict[str, Any]]],
    *,
    again: bool = False,
) -> Index | None:
    """The index of some files, made by whoever comes first, or `again`; None for no files. Where
    the folder cannot be written, each process makes its own, elsewhere."""
    if not paths:
        return None
    path = folder / name_of(paths)
    if not again:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Index(path)
    older = set(folder.glob(f"*{SUFFIX}"))
    parts, about = read(sorted(paths))
    if not parts:
        return None
    try:
        write(path, parts, about)
    except OSError:
        with (
            files.write_errors(folder, CacheError, "set TMPDIR to a folder that takes its index"),
            tempfile.TemporaryDirectory() as own,
        ):
            write(Path(own) / path.name, parts, about)
            return Index(Path(own) / path.name)  # stays open, though its name is gone
    for stale in older - {path}:
        stale.unlink(missing_ok=True)
    return Index(path)
