"""One namespace of the feature cache: the cached outputs of one frozen component."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmllm.errors import CacheError
from mmllm.features.index import Index, open_index
from mmllm.features.shard import (
    DTYPES,
    NO_CHECKSUM,
    SHARD_PATTERN,
    TensorLocation,
    checksum,
    index_shards,
    open_shard,
    tensors_in,
    warn_damaged,
    write_shard,
)
from mmllm.utils import files

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
"""New entries are written as a shard as soon as they have this size."""

FeatureTensors = dict[str, Tensor]
"""The tensors of one medium or caption, by name."""


class DamagedShardError(CacheError):
    """A shard whose content differs from what was written. It is not read again."""


class Namespace:
    """The cached outputs of one frozen component: a mapping from keys to tensors by name.

    New entries stay in memory until `flush`, which is called as soon as they fill a shard.

    Args:
        folder: the folder of its shards; it is created on the first write.
        metadata: kind, component and fingerprint, written to the folder for `list_namespaces`.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str]):
        self.folder = folder
        self.metadata = metadata
        self._seen = set(folder.glob(SHARD_PATTERN))
        self._index = open_index(folder, self._seen, index_shards)
        # Tensors by key in shards that were written after the index was opened.
        self._later: dict[str, dict[str, TensorLocation]] = {}
        self._damaged: set[Path] = set()
        self._new: dict[str, FeatureTensors] = {}
        self._new_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._new or bool(self._places(key))

    def __getitem__(self, key: str) -> FeatureTensors:
        """Return the tensors of a key.

        Raises:
            KeyError: the key is not cached.
            DamagedShardError: its shard is damaged; from now on the key is found in another shard,
                or is missing.
        """
        if key in self._new:
            return self._new[key]
        places = self._places(key)
        if not places:
            raise KeyError(key)
        return {name: self._read(f"{key}/{name}", place) for name, place in places.items()}

    def __setitem__(self, key: str, entry: FeatureTensors) -> None:
        self._new[key] = entry
        self._new_bytes += sum(value.numel() * value.element_size() for value in entry.values())
        if self._new_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the new entries as one shard. Raises CacheError if it cannot be written."""
        if not self._new:
            return
        files.remove_stale_drafts(self.folder)
        tensors = {
            f"{key}/{name}": value
            for key, entry in self._new.items()
            for name, value in entry.items()
        }
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        with _written(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.describe()
            write_shard(path, tensors)
            self._add(path)
        self._new, self._new_bytes = {}, 0

    def describe(self) -> None:
        """Write the metadata to room.json if it is missing or damaged. Raises OSError."""
        path, text = self.folder / "room.json", json.dumps(self.metadata, indent=1)
        if not path.exists() or path.read_bytes() != text.encode():
            files.atomic_write(path, text)

    def refresh(self) -> None:
        """Find the shards that other processes have written since the last refresh."""
        for path in set(self.folder.glob(SHARD_PATTERN)) - self._seen:
            try:
                self._add(path)
            except (OSError, ValueError) as error:
                warn_damaged(path, error)

    def _add(self, path: Path) -> None:
        self._seen.add(path)
        for name, place in tensors_in(path):
            key, _, tensor = name.partition("/")
            self._later.setdefault(key, {})[tensor] = place

    def _places(self, key: str) -> dict[str, TensorLocation]:
        """Return the locations of a key's tensors by name, in shards not known to be damaged."""
        later = self._later.get(key, {})
        if later and not self._damaged.intersection(place.shard for place in later.values()):
            return later
        if self._index is None:
            return {}
        try:
            return self._indexed_places(self._index, key)
        except (OSError, ValueError) as error:
            logger.warning("making a damaged index of the cache again: %s", error)
            self._index = open_index(self.folder, self._seen, index_shards, again=True)
            return self._indexed_places(self._index, key) if self._index else {}

    def _indexed_places(self, table: Index, key: str) -> dict[str, TensorLocation]:
        about, by_shard = table.about, {}
        for name in about["names"]:
            for record in table[f"{key}/{name}"]:
                dtype, shape = about["layouts"][record["layout"]]
                shard = self.folder / about["files"][record["file"]]
                found = by_shard.setdefault(shard, {})
                offset, crc = int(record["offset"]), int(record["checksum"])
                found[name] = TensorLocation(shard, dtype, tuple(shape), offset, crc)
        whole = (places for shard, places in by_shard.items() if shard not in self._damaged)
        return next(whole, {})

    def _read(self, name: str, place: TensorLocation) -> Tensor:
        dtype = DTYPES[place.dtype]
        data = bytearray(math.prod(place.shape) * dtype.itemsize)
        try:
            read = os.preadv(open_shard(place.shard).fileno(), [data], place.offset) if data else 0
        except OSError as error:
            raise self._damage(place.shard, error.strerror or str(error)) from error
        if read != len(data):
            raise self._damage(place.shard, "cut off")
        if place.checksum not in (NO_CHECKSUM, checksum(name, place.dtype, place.shape, data)):
            raise self._damage(place.shard, f"{name} has another checksum than was written")
        if not data:
            return torch.empty(place.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(place.shape)

    def _damage(self, shard: Path, why: str) -> DamagedShardError:
        self._damaged.add(shard)
        warn_damaged(shard, why)
        cache = self.folder.parent
        return DamagedShardError(
            f"{shard}: damaged: {why}; run `mmllm cache prune {cache}`, which deletes such files, "
            "and then `mmllm cache` with this config"
        )


def read_metadata(folder: Path) -> dict[str, str]:
    """Return the metadata of the namespace in `folder`. Raises CacheError if it is unreadable."""
    try:
        return json.loads((folder / "room.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder}: no readable room.json: {error}") from error


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Convert failures to write inside the block into CacheError."""
    with files.write_errors(
        folder, CacheError, "free some space, or let stage.cache be another folder"
    ):
        yield
