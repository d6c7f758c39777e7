"""SHA-256 of bytes, files and plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256(data: bytes | str) -> str:
    """Return the SHA-256 of bytes, or of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits. Raises OSError."""
    return _file_digest(path).hex()


def sha256_files(paths: Iterable[str | Path]) -> str:
    """Return one hash of the contents of several files: the SHA-256 of their SHA-256s, in order.
    Raises OSError."""
    total = hashlib.sha256()
    for path in paths:
        total.update(_file_digest(path))
    return total.hexdigest()


def fingerprint(tree: Any) -> str:
    """Return a hash of JSON-like data, 16 hexadecimal digits that do not depend on the order of
    keys. Values that JSON cannot represent are replaced by their `str`."""
    return sha256(json.dumps(tree, sort_keys=True, default=str))[:16]


def _file_digest(path: str | Path) -> bytes:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
