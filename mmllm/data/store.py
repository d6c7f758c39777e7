"""The feature cache on disk: what frozen parts say of media and captions, found by content.

    FOLDER/<kind>-<fingerprint>/room.json         what part made this, in words
    FOLDER/<kind>-<fingerprint>/<shard>.safetensors   tensors "<key>/<name>"
    FOLDER/files/<list>.json                      path, size, time -> hash of the content
    …/<hash>.index                                where everything lies, made from these files

A key is the hash of a medium's bytes or of a caption, a room belongs to one frozen part with one
fingerprint, so nothing stale can be found. Shards are written under another name and renamed: any
number of processes and machines fill one folder without a server, and a killed one leaves nothing
but a partial file that `prune` deletes. What a process has not written itself is found through an
index on disk (mmllm.data.index), so its memory does not grow with the cache; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmllm.conversation import Embedded, Medium
from mmllm.data import index
from mmllm.data.index import Index
from mmllm.errors import CacheError, MediaError
from mmllm.weights import save_tensors

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
_SHARDS = "*.safetensors"
_PARTIAL = ".partial"
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
"""What safetensors calls them."""

Entry = dict[str, Tensor]
"""The tensors of one medium or caption, by name."""


class Room:
    """One frozen part's answers: a mapping from keys to tensors. New ones wait in memory until
    `flush`, which `put` calls when they fill a shard."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._seen = set(folder.glob(_SHARDS))
        self._index = _indexed(folder, self._seen, _records_of_shards)
        self._later: dict[str, dict[str, Place]] = {}  # of shards that came since, by key
        self._new: dict[str, Entry] = {}
        self._new_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._new or key in self._later or bool(self._places(key))

    def __getitem__(self, key: str) -> Entry:
        if key in self._new:
            return self._new[key]
        places = self._later.get(key) or self._places(key)
        if not places:
            raise KeyError(key)
        return {name: self._read(place) for name, place in places.items()}

    def __setitem__(self, key: str, entry: Entry) -> None:
        self._new[key] = entry
        self._new_bytes += sum(value.numel() * value.element_size() for value in entry.values())
        if self._new_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is new; raises CacheError when the disk does not take it."""
        if not self._new:
            return
        tensors = {
            f"{key}/{name}": value
            for key, entry in self._new.items()
            for name, value in entry.items()
        }
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            draft = path.with_suffix(_PARTIAL)
            save_tensors(tensors, draft)
            draft.rename(path)
            self._add(path)
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{self.folder}: cannot be written: {error}; free some space"
            ) from error
        self._new, self._new_bytes = {}, 0

    def refresh(self) -> None:
        """See what other processes have written since."""
        for path in set(self.folder.glob(_SHARDS)) - self._seen:
            try:
                self._add(path)
            except (OSError, ValueError) as error:
                _pass_over(path, error)

    def _add(self, path: Path) -> None:
        self._seen.add(path)
        for name, place in _places_in(path):
            key, _, tensor = name.partition("/")
            self._later.setdefault(key, {})[tensor] = place

    def _places(self, key: str) -> dict[str, Place]:
        """Where the tensors of a key lie, by name, as the index says."""
        if self._index is None:
            return {}
        about, found = self._index.about, {}
        for name in about["names"]:
            for record in self._index[f"{key}/{name}"][:1]:
                dtype, shape = about["layouts"][record["layout"]]
                shard = self.folder / about["files"][record["file"]]
                found[name] = Place(shard, dtype, tuple(shape), int(record["offset"]))
        return found

    def _read(self, place: Place) -> Tensor:
        dtype = _DTYPES[place.dtype]
        data = bytearray(math.prod(place.shape) * dtype.itemsize)
        if not data:
            return torch.empty(place.shape, dtype=dtype)
        read = os.preadv(_opened(place.shard).fileno(), [data], place.offset)
        if read != len(data):
            raise CacheError(
                f"{place.shard}: cut off; run `mmllm cache prune {self.folder.parent}`"
            )
        return torch.frombuffer(data, dtype=dtype).view(place.shape)


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: `offset` bytes into `shard`; `dtype` as safetensors names it."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class FeatureStore:
    """A folder of rooms. `complete`: nothing may be computed; what is missing is an error."""

    def __init__(self, folder: str | Path, *, complete: bool = False):
        self.folder = Path(folder).expanduser()
        self.complete = complete
        self._rooms: dict[str, Room] = {}
        self._hashes: dict[str, str] = {}  # of files that no list had when this was opened
        lists = set((self.folder / "files").glob("*.json"))
        self._listed = _indexed(self.folder / "files", lists, _records_of_lists)
        self._new_hashes: dict[str, str] = {}

    def room(self, kind: str, part: str, fingerprint: str) -> Room:
        """The room of one frozen part: `kind` says of what (features, conditions, latents), `part`
        what the system calls it."""
        name = f"{kind}-{fingerprint}"
        if name not in self._rooms:
            folder = self.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            about = {"kind": kind, "part": part, "fingerprint": fingerprint}
            write_json(folder / "room.json", about)
            self._rooms[name] = Room(folder)
        return self._rooms[name]

    def missing(self, kind: str, part: str, fingerprint: str, what: str) -> CacheError:
        """The error for something that is not there and may not be computed."""
        others = sorted(
            about["fingerprint"]
            for about in map(read_room, self.folder.glob(f"{kind}-*"))
            if about["part"] == part and about["fingerprint"] != fingerprint
        )
        reason = f"; the cache was made with {', '.join(others)}" if others else ""
        return CacheError(
            f"{self.folder}: no {kind} of {what} for {part}, fingerprint {fingerprint}{reason}; "
            "run `mmllm cache` with this config"
        )

    def key(self, medium: Medium) -> str:
        """The hash of a medium's bytes; that of a file is remembered with its size and time.
        Raises MediaError for a file that cannot be read."""
        source = medium.source
        if isinstance(source, Embedded):
            source = source.read()
        if not isinstance(source, str | Path):
            data = source if source is not None else medium.to_numpy().tobytes()
            return hashlib.sha256(data).hexdigest()
        try:
            stat = Path(source).stat()
            name = f"{Path(source).resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
            for record in self._listed[name][:1] if self._listed else ():
                return record["sha256"].tobytes().hex()
            if name not in self._hashes:
                with Path(source).open("rb") as stream:
                    self._hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
                self._new_hashes[name] = self._hashes[name]
        except OSError as error:
            raise MediaError(f"{source}: {error.strerror or error}") from error
        return self._hashes[name]

    def flush(self) -> None:
        for room in self._rooms.values():
            room.flush()
        if self._new_hashes:
            (self.folder / "files").mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "files" / f"{uuid.uuid4().hex}.json", self._new_hashes)
            self._new_hashes = {}

    def refresh(self) -> None:
        for room in self._rooms.values():
            room.refresh()


@dataclass(frozen=True)
class RoomSize:
    """What one room holds."""

    kind: str
    part: str
    fingerprint: str
    items: int
    duplicates: int
    shards: int
    bytes: int


def survey(folder: Path) -> list[RoomSize]:
    """Every room of a cache folder; raises CacheError where there is none."""
    rooms = sorted(path.parent for path in folder.glob("*/room.json"))
    if not rooms:
        raise CacheError(f"{folder}: no feature cache there")
    sizes = []
    for room in rooms:
        about, keys, total, count = read_room(room), set(), 0, 0
        shards = sorted(room.glob("*.safetensors"))
        for shard in shards:
            found = _keys_of(shard)
            keys |= found
            count += len(found)
            total += shard.stat().st_size
        sizes.append(
            RoomSize(
                about["kind"],
                about["part"],
                about["fingerprint"],
                len(keys),
                count - len(keys),
                len(shards),
                total,
            )
        )
    return sizes


def verify(folder: Path) -> list[tuple[Path, str]]:
    """Read every tensor of every shard; returns the damaged files and why."""
    survey(folder)
    damaged = []
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    if not shard.get_tensor(name).isfinite().all():
                        raise ValueError(f"{name} holds values that are not finite")
        except (OSError, SafetensorError, ValueError) as error:
            damaged.append((path, str(error)))
    return damaged


def prune(folder: Path, keep: set[str] | None = None) -> int:
    """Delete partial and damaged files, whole shards of duplicates, and the rooms whose
    fingerprints are not in `keep` (None: keep all). Returns the bytes that became free. Nothing
    may be writing meanwhile."""
    survey(folder)
    doomed = list(folder.glob(f"*/*{_PARTIAL}")) + [path for path, _ in verify(folder)]
    for room in sorted(path.parent for path in folder.glob("*/room.json")):
        if keep is not None and read_room(room)["fingerprint"] not in keep:
            doomed += [file for file in room.iterdir() if file not in doomed]
            continue
        seen: set[str] = set()
        for shard in sorted(set(room.glob("*.safetensors")) - set(doomed)):
            keys = _keys_of(shard)
            if keys <= seen:
                doomed.append(shard)
            seen |= keys
    freed = sum(path.stat().st_size for path in doomed)
    for path in doomed:
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    return freed


def read_room(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / "room.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder}: no readable room.json: {error}") from error


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Whole or not at all, whoever else writes."""
    draft = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
        draft.rename(path)
    except OSError as error:
        raise CacheError(f"{path}: cannot be written: {error}") from error


def _keys_of(path: Path) -> set[str]:
    try:
        return {name.partition("/")[0] for name, _ in _places_in(path)}
    except (OSError, ValueError):
        return set()


def _places_in(path: Path) -> Iterator[tuple[str, Place]]:
    """Every tensor of a shard by its whole name; raises ValueError for a file that is not whole."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("no safetensors header")
        head = json.loads(stream.read(length))
    head.pop("__metadata__", None)
    ends = [entry["data_offsets"][1] for entry in head.values()]
    if 8 + length + max(ends, default=0) != path.stat().st_size:
        raise ValueError("it is cut off, or longer than its header says")
    for name, entry in head.items():
        begin = 8 + length + entry["data_offsets"][0]
        yield name, Place(path, entry["dtype"], tuple(entry["shape"]), begin)


def _indexed(
    folder: Path,
    paths: set[Path],
    read: Callable[[list[Path]], tuple[list[np.ndarray], dict[str, Any]]],
) -> Index | None:
    """The index of some files, made by whoever comes first; None for no files. Where the folder
    cannot be written, each process makes its own, elsewhere."""
    if not paths:
        return None
    path = folder / index.name_of(paths)
    with contextlib.suppress(OSError, ValueError):
        return Index(path)
    older = set(folder.glob(f"*{index.SUFFIX}"))
    parts, about = read(sorted(paths))
    if not parts:
        return None
    try:
        index.write(path, parts, about)
    except OSError:
        with tempfile.TemporaryDirectory() as own:
            index.write(Path(own) / path.name, parts, about)
            return Index(Path(own) / path.name)  # stays open, though its name is gone
    for stale in older - {path}:
        stale.unlink(missing_ok=True)
    return Index(path)


def _records_of_shards(paths: list[Path]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """One record a tensor: file, layout (type and shape) and offset."""
    layouts: dict[tuple[str, tuple[int, ...]], int] = {}
    names: dict[str, None] = {}
    parts = []
    for number, path in enumerate(paths):
        try:
            found = list(_places_in(path))
        except (OSError, ValueError) as error:
            _pass_over(path, error)
            continue
        names |= dict.fromkeys(name.partition("/")[2] for name, _ in found)
        layout = [layouts.setdefault((p.dtype, p.shape), len(layouts)) for _, p in found]
        offsets = [place.offset for _, place in found]
        parts.append(
            index.records(
                [name for name, _ in found],
                {
                    "file": ("<u4", np.full(len(found), number)),
                    "layout": ("<u4", layout),
                    "offset": ("<u8", offsets),
                },
            )
        )
    about = {
        "files": [path.name for path in paths],
        "names": list(names),
        "layouts": [list(layout) for layout in layouts],
    }
    return parts, about


def _records_of_lists(paths: list[Path]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """One record a file whose hash is known."""
    parts = []
    for path in paths:
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            hashes = [
                np.frombuffer(bytes.fromhex(value), dtype="V32")[0] for value in known.values()
            ]
        except (OSError, ValueError) as error:
            logger.warning("passing over a damaged list of the cache: %s: %s", path, error)
            continue
        parts.append(index.records(list(known), {"sha256": ("V32", hashes)}))
    return parts, {}


def _pass_over(path: Path, error: Exception) -> None:
    logger.warning("passing over a damaged shard of the cache: %s: %s", path, error)


@functools.lru_cache(maxsize=256)
def _opened(path: Path) -> io.FileIO:
    """Shards are never written again, so that an open one stays what it is."""
    return io.FileIO(path)
