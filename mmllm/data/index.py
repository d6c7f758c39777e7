"""A table of records on disk that are found by name; nothing of it stays in memory.

    8 bytes: length of the head | JSON head | starts of buckets | records, sorted by hash

Names are hashed to 128 bits, whose first bits are the bucket: a look-up reads two numbers and then
the few records of one bucket. A file is written whole or not at all, and made again from what it
tells of when that has changed. Files are read, not mapped, so they count as nobody's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SUFFIX = ".index"
_BUCKET = 16
"""Records of a bucket, about."""


class Index:
    """`index[name]`: the records of a name. `about`: what the writer told of the whole."""

    def __init__(self, path: Path):
        """Raises OSError or ValueError for a file that is none, or is not whole."""
        self.path = path
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._read(0, 8), "little")
        head = json.loads(self._read(8, length))
        self.about: dict[str, Any] = head["about"]
        self.type = np.dtype([tuple(entry) for entry in head["type"]])
        self._bits: int = head["bits"]
        self._starts = 8 + length
        self._records = self._starts + 8 * (2**self._bits + 1)
        self.count: int = head["count"]
        if os.fstat(self._file.fileno()).st_size != self._records + self.count * self.type.itemsize:
            raise ValueError(f"{path} is not whole")

    def __getitem__(self, name: str) -> np.ndarray:
        high, low = hash_of(name)
        bucket = high >> (64 - self._bits) if self._bits else 0
        starts = self._read(self._starts + 8 * bucket, 16)
        start, stop = np.frombuffer(starts, dtype="<u8").tolist()
        size = self.type.itemsize
        data = self._read(self._records + start * size, (stop - start) * size)
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
    kind = [list(entry) for entry in table.dtype.descr]
    head = json.dumps({"about": about, "type": kind, "bits": bits, "count": len(table)}).encode()
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with draft.open("wb") as stream:
        for piece in (len(head).to_bytes(8, "little"), head, starts.tobytes(), table.tobytes()):
            stream.write(piece)
    draft.replace(path)


def name_of(paths: Iterable[Path]) -> str:
    """What an index of these files is called: another name when one is added, gone or changed in
    size."""
    told = sorted(f"{path.name}:{path.stat().st_size}" for path in paths)
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32] + SUFFIX
