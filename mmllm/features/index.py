"""A hash table of records on disk, looked up by name without being loaded into memory.

    length and CRC-32 of the header | JSON header | starts and CRC-32s of buckets | records by hash

Names are hashed to 128 bits, whose first bits select the bucket. A look-up reads the start and end
of the bucket, then its few records, and compares their checksum. An index is written atomically; it
is rebuilt when the files that it indexes have changed, or when it is damaged. It is read with
`pread`, not memory-mapped, so it does not count as memory of any process.

It is no SQLite database for these reasons. SQLite has no checksums of records; a connection must
not be used after a fork, by which data workers start; its write-ahead log needs shared memory,
which network file systems lack; and an index in a temporary folder, which is deleted as soon as it
is open, could not be opened again. SQLite is built in twice the time. It looks a record up in 7
microseconds of CPU time instead of 12, of the 50 that reading an entry of 20 KB takes
(`python benchmarks/cache.py index` compares look-ups).
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
"""Mean number of records per bucket."""
_HEAD = 12
"""Bytes before the JSON header: eight of its length, four of its checksum."""
_EDGE = np.dtype([("start", "<u8"), ("checksum", "<u4")])
_FORMAT = 2
"""Version of the format. It is part of an index's file name, so other versions are not opened."""


class Index:
    """An open index file: `index[name]` returns the records of a name.

    Args:
        path: a file that `write` wrote.

    Attributes:
        about: what the writer stored about all records.
        type: numpy dtype of a record.
        count: number of records.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no index, damaged, or truncated.
    """

    def __init__(self, path: Path):
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
        """Return the records of a name, maybe none. Raises OSError or ValueError if the file is
        damaged."""
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
        """Pickle the path: a data worker that does not inherit the open file opens it again."""
        return Index, (self.path,)

    def _read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)


def hash_of(name: str) -> tuple[int, int]:
    """Return a 128-bit hash of a name as two 64-bit integers, the high bits first."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def records(
    names: Sequence[str], fields: Mapping[str, tuple[str, Sequence[Any] | np.ndarray]]
) -> np.ndarray:
    """Build an array of records, one per name.

    Args:
        names: the names by which the records are found.
        fields: field -> (numpy dtype, one value per record).
    """
    kinds = {name: kind for name, (kind, _) in fields.items()}
    found = np.empty(len(names), dtype=[("high", "<u8"), ("low", "<u8"), *kinds.items()])
    hashes = np.array([hash_of(name) for name in names], dtype="<u8").reshape(-1, 2)
    found["high"], found["low"] = hashes[:, 0], hashes[:, 1]
    for name, (_, values) in fields.items():
        found[name] = values
    return found


def write(path: Path, parts: Iterable[np.ndarray], about: Mapping[str, Any]) -> None:
    """Write an index atomically.

    Args:
        path: the file to write.
        parts: arrays of records of one dtype, see `records`.
        about: JSON data about all records.

    Raises:
        OSError: the file cannot be written.
    """
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
    """Return the CRC-32 of a bucket's records and of its start."""
    return zlib.crc32(records, start & 0xFFFFFFFF)


def name_of(paths: Iterable[Path]) -> str:
    """Return the file name of an index of these files: it differs if a file is added or removed, or
    changes its size."""
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
    """Open the index of some files; build it first if it does not exist.

    Args:
        folder: where the index is kept. If the folder cannot be written, the index is built in a
            temporary folder, for this process alone.
        paths: the files that are indexed.
        read: returns the records of the files, and the header of the index.
        again: whether to rebuild an index that exists.

    Returns:
        The index; None if there are no files or no records.

    Raises:
        CacheError: no folder takes the index.
    """
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
            return Index(Path(own) / path.name)  # stays open after the folder is deleted
    for stale in older - {path}:
        stale.unlink(missing_ok=True)
    return Index(path)
