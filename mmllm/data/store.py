"""The feature cache on disk: what frozen parts say of media and captions, found by content.

    FOLDER/<kind>-<fingerprint>/room.json         what part made this, in words
    FOLDER/<kind>-<fingerprint>/<shard>.safetensors   tensors "<key>/<name>", the header the index
    FOLDER/files/<list>.json                      path, size, time -> hash of the content

A key is the hash of a medium's bytes or of a caption, a room belongs to one frozen part with one
fingerprint, so nothing stale can be found. Shards are written under another name and renamed: any
number of processes and machines fill one folder without a server, and a killed one leaves nothing
but a partial file that `prune` deletes. Reading maps the files into memory; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmllm.conversation import Embedded, Medium
from mmllm.errors import CacheError, MediaError
from mmllm.weights import save_tensors

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
_PARTIAL = ".partial"

Entry = dict[str, Tensor]
"""The tensors of one medium or caption, by name."""


class Room:
    """One frozen part's answers: a mapping from keys to tensors. New ones wait in memory until
    `flush`, which `put` calls when they fill a shard."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._index: dict[str, tuple[Path, list[str]]] = {}
        self._seen: set[Path] = set()
        self._open: dict[Path, safe_open] = {}
        self._new: dict[str, Entry] = {}
        self._new_bytes = 0
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._new or key in self._index

    def __len__(self) -> int:
        return len(self._new.keys() | self._index.keys())

    def __getitem__(self, key: str) -> Entry:
        if key in self._new:
            return self._new[key]
        path, names = self._index[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        shard = self._open[path]
        return {name: shard.get_tensor(f"{key}/{name}") for name in names}

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
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{self.folder}: cannot be written: {error}; free some space"
            ) from error
        self._index |= {key: (path, list(entry)) for key, entry in self._new.items()}
        self._seen.add(path)
        self._new, self._new_bytes = {}, 0

    def refresh(self) -> None:
        """See what other processes have written since."""
        for path in self.folder.glob("*.safetensors"):
            if path not in self._seen:
                try:
                    with safe_open(path, framework="pt") as shard:
                        self._index |= {k: (path, names) for k, names in _names(shard).items()}
                except (OSError, SafetensorError) as error:
                    logger.warning("passing over a damaged shard of the cache: %s: %s", path, error)
                self._seen.add(path)


class FeatureStore:
    """A folder of rooms. `complete`: nothing may be computed; what is missing is an error."""

    def __init__(self, folder: str | Path, *, complete: bool = False):
        self.folder = Path(folder).expanduser()
        self.complete = complete
        self._rooms: dict[str, Room] = {}
        self._hashes: dict[str, str] = {}
        self._new_hashes: dict[str, str] = {}
        for path in (self.folder / "files").glob("*.json"):
            try:
                self._hashes |= json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                logger.warning("passing over a damaged list of the cache: %s: %s", path, error)

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


def _names(shard: safe_open) -> dict[str, list[str]]:
    """Key -> the names of its tensors, from the header."""
    found: dict[str, list[str]] = {}
    for name in shard.keys():  # noqa: SIM118 - not a mapping
        key, _, tensor = name.partition("/")
        found.setdefault(key, []).append(tensor)
    return found


def _keys_of(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as shard:
            return set(_names(shard))
    except (OSError, SafetensorError):
        return set()
