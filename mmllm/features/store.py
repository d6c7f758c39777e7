"""The feature cache on disk: what frozen parts say of media and captions, found by content.

    FOLDER/<kind>-<fingerprint>/room.json         what part made this, in words
    FOLDER/<kind>-<fingerprint>/<shard>.safetensors   tensors "<key>/<name>", their CRC-32s
    FOLDER/files/<list>.json                      path, size, time -> hash of the content
    …/<hash>.index                                where everything lies, made from these files

A key is the hash of a medium's bytes or of a caption; a namespace belongs to one frozen component
with one fingerprint, so a stale entry is never found. Shards are written atomically
(mmllm.utils.files): any number of processes and machines fill one folder without a server, and a
killed one leaves nothing but a draft. Every tensor is verified when it is read, by a checksum of
its bytes, name, type and shape. Entries of other processes are found through an index on disk
(mmllm.features.index), so that memory does not grow with the cache. Nothing is unpickled, and a
complete cache can be read from a read-only file system.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.conversation import Medium
from mmllm.errors import CacheError, MediaError
from mmllm.features import index
from mmllm.features.index import Index
from mmllm.media import Embedded
from mmllm.utils import files
from mmllm.utils.hashing import sha256, sha256_file
from mmllm.weights import save_tensors

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
_SHARDS = "*.safetensors"
_CHECKSUMS = "crc32"
"""Entry of a shard's metadata: JSON {tensor: checksum}. Shards of earlier versions have none."""
_UNKNOWN = -1
"""What stands in an index for a checksum that is not there."""
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
"""What safetensors calls them."""

FeatureTensors = dict[str, Tensor]
"""The tensors of one medium or caption, by name."""


class DamagedShardError(CacheError):
    """The content of a shard differs from what was written. It is not read again."""


class Namespace:
    """The cached outputs of one frozen component: a mapping from keys to tensors by name.

    New entries stay in memory until `flush`, which is called as soon as they fill a shard.

    Args:
        folder: made when something is written.
        metadata: kind, component and fingerprint, for people and for `list_namespaces`.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str]):
        self.folder = folder
        self.metadata = metadata
        self._seen = set(folder.glob(_SHARDS))
        self._index = _indexed(folder, self._seen, _records_of_shards)
        self._later: dict[str, dict[str, TensorLocation]] = {}  # of shards that came since, by key
        self._damaged: set[Path] = set()
        self._new: dict[str, FeatureTensors] = {}
        self._new_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._new or bool(self._places(key))

    def __getitem__(self, key: str) -> FeatureTensors:
        """Return the tensors of a key.

        Raises:
            KeyError: it is not cached.
            DamagedShardError: its shard is damaged; from now on the key is found in
                another shard, or missing.
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
        """Write new entries as one shard. Raises CacheError if the disk refuses it."""
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
            sums = {name: _checksum(name, value) for name, value in tensors.items()}
            with files.atomic_file(path) as draft:
                save_tensors(tensors, draft, {_CHECKSUMS: json.dumps(sums)})
            self._add(path)
        self._new, self._new_bytes = {}, 0

    def describe(self) -> None:
        """Write room.json where it is missing or damaged. Raises OSError."""
        path, text = self.folder / "room.json", json.dumps(self.metadata, indent=1)
        if not path.exists() or path.read_bytes() != text.encode():
            files.atomic_write(path, text)

    def refresh(self) -> None:
        """Find the shards that other processes have written since."""
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

    def _places(self, key: str) -> dict[str, TensorLocation]:
        """Where the tensors of a key lie, by name, in shards that are not known to be damaged."""
        later = self._later.get(key, {})
        if later and not self._damaged.intersection(place.shard for place in later.values()):
            return later
        if self._index is None:
            return {}
        try:
            return self._indexed_places(self._index, key)
        except (OSError, ValueError) as error:
            logger.warning("making a damaged index of the cache again: %s", error)
            self._index = _indexed(self.folder, self._seen, _records_of_shards, again=True)
            return self._indexed_places(self._index, key) if self._index else {}

    def _indexed_places(self, table: Index, key: str) -> dict[str, TensorLocation]:
        about, by_shard = table.about, {}
        for name in about["names"]:
            for record in table[f"{key}/{name}"]:
                dtype, shape = about["layouts"][record["layout"]]
                shard = self.folder / about["files"][record["file"]]
                found = by_shard.setdefault(shard, {})
                checksum = int(record["checksum"])
                found[name] = TensorLocation(
                    shard, dtype, tuple(shape), int(record["offset"]), checksum
                )
        whole = (places for shard, places in by_shard.items() if shard not in self._damaged)
        return next(whole, {})

    def _read(self, name: str, place: TensorLocation) -> Tensor:
        dtype = _DTYPES[place.dtype]
        data = bytearray(math.prod(place.shape) * dtype.itemsize)
        try:
            read = os.preadv(_opened(place.shard).fileno(), [data], place.offset) if data else 0
        except OSError as error:
            raise self._damage(place.shard, error.strerror or str(error)) from error
        if read != len(data):
            raise self._damage(place.shard, "cut off")
        if place.checksum not in (_UNKNOWN, _checksum_of(name, place.dtype, place.shape, data)):
            raise self._damage(place.shard, f"{name} has another checksum than was written")
        if not data:
            return torch.empty(place.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(place.shape)

    def _damage(self, shard: Path, why: str) -> DamagedShardError:
        self._damaged.add(shard)
        _pass_over(shard, why)
        cache = self.folder.parent
        return DamagedShardError(
            f"{shard}: damaged: {why}; run `mmllm cache prune {cache}`, which deletes such files, "
            "and then `mmllm cache` with this config"
        )


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor lies: `offset` bytes into `shard`; `dtype` as safetensors names it."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    checksum: int


class FeatureStore:
    """A folder of namespaces.

    Args:
        folder: where they lie.
        complete: nothing may be computed; a missing entry is an error.
    """

    def __init__(self, folder: str | Path, *, complete: bool = False):
        self.folder = Path(folder).expanduser()
        self.complete = complete
        self._namespaces: dict[str, Namespace] = {}
        self._hashes: dict[str, str] = {}  # of files that no list had when this was opened
        self._lists = set((self.folder / "files").glob("*.json"))
        self._listed = _indexed(self.folder / "files", self._lists, _records_of_lists)
        self._new_hashes: dict[str, str] = {}

    def namespace(self, kind: str, part: str, fingerprint: str) -> Namespace:
        """Return the namespace of one frozen component.

        Args:
            kind: "features", "conditions" or "latents".
            part: the component's path in the system config, such as "encoders.image".
            fingerprint: identifies its weights and preprocessing.
        """
        name = f"{kind}-{fingerprint}"
        if name not in self._namespaces:
            about = {"kind": kind, "part": part, "fingerprint": fingerprint}
            self._namespaces[name] = Namespace(self.folder / name, about)
            if (self.folder / name).is_dir():
                with contextlib.suppress(OSError):  # it may be read-only
                    self._namespaces[name].describe()
        return self._namespaces[name]

    def missing(self, kind: str, part: str, fingerprint: str, what: str) -> CacheError:
        """Return the error for an entry that is missing and may not be computed."""
        others = sorted(
            about["fingerprint"]
            for about in map(read_metadata, self.folder.glob(f"{kind}-*"))
            if about["part"] == part and about["fingerprint"] != fingerprint
        )
        reason = f"; the cache was made with {', '.join(others)}" if others else ""
        return CacheError(
            f"{self.folder}: no {kind} of {what} for {part}, fingerprint {fingerprint}{reason}; "
            "run `mmllm cache` with this config"
        )

    def key(self, medium: Medium) -> str:
        """Return the SHA-256 of a medium's content; that of a file is kept with its size and time.
        Raises MediaError for a file that cannot be read."""
        source = medium.source
        if isinstance(source, Embedded):
            source = source.read()
        if not isinstance(source, str | Path):
            data = source if source is not None else medium.to_numpy().tobytes()
            return sha256(data)
        try:
            stat = Path(source).stat()
            name = f"{Path(source).resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
            listed = self._look_up(name)
            if listed is not None:
                return listed
            if name not in self._hashes:
                self._hashes[name] = sha256_file(source)
                self._new_hashes[name] = self._hashes[name]
        except OSError as error:
            raise MediaError(f"{source}: {error.strerror or error}") from error
        return self._hashes[name]

    def _look_up(self, name: str) -> str | None:
        """The hash of a file that a list has."""
        for again in (False, True):
            if self._listed is None:
                return None
            try:
                found = self._listed[name][:1]
                return found["sha256"].tobytes().hex() if len(found) else None
            except (OSError, ValueError) as error:
                if again:
                    raise
                logger.warning("making a damaged index of the cache again: %s", error)
                folder = self.folder / "files"
                self._listed = _indexed(folder, self._lists, _records_of_lists, again=True)
        return None

    def flush(self) -> None:
        """Write what is new. Raises CacheError where features cannot be written; hashes of files,
        which only spare reading them again, need not be."""
        for namespace in self._namespaces.values():
            namespace.flush()
        if self._new_hashes:
            path = self.folder / "files" / f"{uuid.uuid4().hex}.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                files.atomic_write(path, json.dumps(self._new_hashes, indent=1))
            except OSError as error:
                logger.info("%s: cannot be written, and need not be: %s", path, error)
            self._new_hashes = {}

    def refresh(self) -> None:
        for namespace in self._namespaces.values():
            namespace.refresh()

    def index(self) -> None:
        """Leave an index of everything, so that those who may only read need not make their own."""
        for namespace in self._namespaces.values():
            _indexed(namespace.folder, set(namespace.folder.glob(_SHARDS)), _records_of_shards)
        lists = set((self.folder / "files").glob("*.json"))
        _indexed(self.folder / "files", lists, _records_of_lists)


@dataclass(frozen=True)
class NamespaceStats:
    """Sizes of one namespace."""

    kind: str
    part: str
    fingerprint: str
    items: int
    duplicates: int
    shards: int
    bytes: int


def list_namespaces(folder: Path) -> list[NamespaceStats]:
    """Return the sizes of all namespaces of a cache folder. Raises CacheError if it has none."""
    namespaces = sorted(path.parent for path in folder.glob("*/room.json"))
    if not namespaces:
        raise CacheError(f"{folder}: no feature cache there")
    sizes = []
    for namespace in namespaces:
        about, keys, total, count = read_metadata(namespace), set(), 0, 0
        shards = sorted(namespace.glob("*.safetensors"))
        for shard in shards:
            found = _keys_of(shard)
            keys |= found
            count += len(found)
            total += shard.stat().st_size
        sizes.append(
            NamespaceStats(
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


def verify(folder: Path) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Read every tensor of every shard and compare it with its checksum. Returns the damaged files
    and why, and the shards that have no checksums, being of an earlier version."""
    list_namespaces(folder)
    damaged, unverified = [], []
    for path in sorted(folder.glob(f"*/{_SHARDS}")):
        try:
            if not _verify_shard(path):
                unverified.append(path)
        except (OSError, ValueError) as error:
            damaged.append((path, str(error)))
    for path in sorted((folder / "files").glob("*.json")):
        try:
            _hashes_in(path)
        except (OSError, ValueError) as error:
            damaged.append((path, str(error)))
    return damaged, unverified


def _verify_shard(path: Path) -> bool:
    """Whether the shard has checksums. Raises OSError or ValueError where it is damaged."""
    known = True
    with path.open("rb") as stream:
        for name, place in _places_in(path):
            dtype = _DTYPES[place.dtype]
            stream.seek(place.offset)
            data = bytearray(stream.read(math.prod(place.shape) * dtype.itemsize))
            if place.checksum == _UNKNOWN:
                known = False
            elif place.checksum != _checksum_of(name, place.dtype, place.shape, data):
                raise ValueError(f"{name} has another checksum than was written")
            if data and not torch.frombuffer(data, dtype=dtype).isfinite().all():
                raise ValueError(f"{name} holds values that are not finite")
    return known


def prune(folder: Path, keep: set[str] | None = None) -> int:
    """Delete partial and damaged files, whole shards of duplicates, and the namespaces whose
    fingerprints are not in `keep` (None: keep all). Returns the bytes that became free. Nothing
    may be writing meanwhile."""
    list_namespaces(folder)
    doomed = list(folder.glob(f"*/*{files.PARTIAL}")) + [path for path, _ in verify(folder)[0]]
    for namespace in sorted(path.parent for path in folder.glob("*/room.json")):
        if keep is not None and read_metadata(namespace)["fingerprint"] not in keep:
            doomed += [file for file in namespace.iterdir() if file not in doomed]
            continue
        seen: set[str] = set()
        for shard in sorted(set(namespace.glob("*.safetensors")) - set(doomed)):
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


def read_metadata(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / "room.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder}: no readable room.json: {error}") from error


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Raises CacheError for what the disk does not take."""
    with files.write_errors(
        folder, CacheError, "free some space, or let stage.cache be another folder"
    ):
        yield


def _checksum(name: str, value: Tensor) -> int:
    value = value.detach().cpu().contiguous()
    dtype = next(word for word, kind in _DTYPES.items() if kind == value.dtype)
    data = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
    return _checksum_of(name, dtype, tuple(value.shape), data)


def _checksum_of(name: str, dtype: str, shape: tuple[int, ...], data: Any) -> int:
    """The CRC-32 of a tensor's bytes and of what is said of them, so that none passes for another
    and no damaged header or index for a whole one."""
    return zlib.crc32(data, zlib.crc32(f"{name} {dtype} {list(shape)}".encode()))


def _keys_of(path: Path) -> set[str]:
    try:
        return {name.partition("/")[0] for name, _ in _places_in(path)}
    except (OSError, ValueError):
        return set()


def _places_in(path: Path) -> list[tuple[str, TensorLocation]]:
    """Every tensor of a shard by its whole name; raises OSError or ValueError for a file that is
    not whole."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        end = 8 + length
        if end > size:
            raise ValueError("no safetensors header")
        head = json.loads(stream.read(length))
    try:
        metadata = head.pop("__metadata__", None)  # absent in those of earlier versions
        sums = dict.fromkeys(head, _UNKNOWN)
        if metadata:
            sums = json.loads(metadata[_CHECKSUMS])
        places = [
            (
                name,
                TensorLocation(
                    path,
                    entry["dtype"],
                    tuple(map(int, entry["shape"])),
                    8 + length + int(entry["data_offsets"][0]),
                    int(sums[name]),
                ),
            )
            for name, entry in head.items()
        ]
        for _, place in places:
            end = max(end, place.offset + math.prod(place.shape) * _DTYPES[place.dtype].itemsize)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"its header is damaged: {error!r}") from error
    if end != size:
        raise ValueError("it is cut off, or longer than its header says")
    return places


def _indexed(
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
    path = folder / index.name_of(paths)
    if not again:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Index(path)
    older = set(folder.glob(f"*{index.SUFFIX}"))
    parts, about = read(sorted(paths))
    if not parts:
        return None
    try:
        index.write(path, parts, about)
    except OSError:
        with (
            files.write_errors(folder, CacheError, "set TMPDIR to a folder that takes its index"),
            tempfile.TemporaryDirectory() as own,
        ):
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
            found = _places_in(path)
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
                    "checksum": ("<i8", [place.checksum for _, place in found]),
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
            known = _hashes_in(path)
        except (OSError, ValueError) as error:
            logger.warning("passing over a damaged list of the cache: %s: %s", path, error)
            continue
        hashes = [np.frombuffer(value, dtype="V32")[0] for value in known.values()]
        parts.append(index.records(list(known), {"sha256": ("V32", hashes)}))
    return parts, {}


def _hashes_in(path: Path) -> dict[str, bytes]:
    """Raises OSError or ValueError for a list of files' hashes that is damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        found = {str(name): bytes.fromhex(value) for name, value in known.items()}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"no list of hashes: {error}") from error
    if any(len(value) != 32 for value in found.values()):
        raise ValueError("holds what is no SHA-256")
    return found


def _pass_over(path: Path, error: object) -> None:
    logger.warning("passing over a damaged shard of the cache: %s: %s", path, error)


@functools.lru_cache(maxsize=256)
def _opened(path: Path) -> io.FileIO:
    """Shards are never written again, so that an open one stays what it is."""
    return io.FileIO(path)
