"""The feature cache on disk: outputs of frozen encoders and decoders, keyed by content.

    FOLDER/<kind>-<fingerprint>/room.json         metadata of a namespace: the component it is of
    FOLDER/<kind>-<fingerprint>/<shard>.safetensors   tensors "<key>/<name>" and their CRC-32s
    FOLDER/files/<list>.json                      "path:size:mtime" -> SHA-256 of the content
    …/<hash>.index                                locations of all entries, built from these files

A key is the hash of a medium's bytes or of a caption. A namespace belongs to one frozen component
with one fingerprint, so a stale entry is never found. Shards are written atomically
(mmllm.utils.files): any number of processes and machines can fill one folder without a server, and
a killed process leaves nothing but a draft. Every tensor is verified when it is read, by a checksum
of its bytes, name, dtype and shape. Entries of other processes are found through an index on disk
(mmllm.features.index), so memory does not grow with the cache. Nothing is unpickled, and a complete
cache can be read from a read-only file system.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import Medium
from mmllm.errors import CacheError, MediaError
from mmllm.features import index
from mmllm.features.index import open_index
from mmllm.features.namespace import Namespace, read_metadata
from mmllm.features.shard import SHARD_PATTERN, index_shards
from mmllm.media import Embedded
from mmllm.utils import files
from mmllm.utils.hashing import sha256, sha256_file

logger = logging.getLogger(__name__)


class FeatureStore:
    """A feature cache on disk: a folder of namespaces.

    Args:
        folder: the folder of the cache; it is created on the first write.
        complete: whether every entry must exist: a missing one is an error, nothing is computed.

    Raises:
        CacheError: no index of the entries can be written, neither in the folder nor in TMPDIR.
    """

    def __init__(self, folder: str | Path, *, complete: bool = False):
        self.folder = Path(folder).expanduser()
        self.complete = complete
        self._namespaces: dict[str, Namespace] = {}
        self._hashes: dict[str, str] = {}  # of files that were in no list when this was opened
        self._lists = set((self.folder / "files").glob("*.json"))
        self._listed = open_index(self.folder / "files", self._lists, _index_hash_lists)
        self._new_hashes: dict[str, str] = {}

    def namespace(self, kind: str, part: str, fingerprint: str) -> Namespace:
        """Return the namespace of one frozen component.

        Args:
            kind: "features", "conditions" or "latents".
            part: the component's path in the system config, such as "encoders.image".
            fingerprint: the hash that identifies its weights and preprocessing.
        """
        name = f"{kind}-{fingerprint}"
        if name not in self._namespaces:
            about = {"kind": kind, "part": part, "fingerprint": fingerprint}
            self._namespaces[name] = Namespace(self.folder / name, about)
            if (self.folder / name).is_dir():
                with contextlib.suppress(OSError):  # the folder may be read-only
                    self._namespaces[name].describe()
        return self._namespaces[name]

    def missing(self, kind: str, part: str, fingerprint: str, what: str) -> CacheError:
        """Return the error for an entry that is missing from a complete cache.

        Args:
            kind: "features", "conditions" or "latents".
            part: the component's path in the system config.
            fingerprint: that of the component.
            what: the medium or caption, for the message.
        """
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
        """Return the SHA-256 of a medium's content. The hash of a file is stored with its size and
        modification time, so that an unchanged file is read once. Raises MediaError for a file that
        cannot be read."""
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
        """Return the stored hash of the file "path:size:mtime", or None."""
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
                self._listed = open_index(folder, self._lists, _index_hash_lists, again=True)
        return None

    def flush(self) -> None:
        """Write new entries and new file hashes. Raises CacheError if entries cannot be written; a
        failure to write file hashes, which only save time later, is logged."""
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
        """Find the entries that other processes have written since the last refresh."""
        for namespace in self._namespaces.values():
            namespace.refresh()

    def index(self) -> None:
        """Write an index of all entries, so that processes that cannot write need not build it."""
        for namespace in self._namespaces.values():
            open_index(namespace.folder, set(namespace.folder.glob(SHARD_PATTERN)), index_shards)
        lists = set((self.folder / "files").glob("*.json"))
        open_index(self.folder / "files", lists, _index_hash_lists)


def _index_hash_lists(paths: list[Path]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return index records of lists of file hashes, one record per file, and an empty header."""
    parts = []
    for path in paths:
        try:
            known = read_hash_list(path)
        except (OSError, ValueError) as error:
            logger.warning("passing over a damaged list of the cache: %s: %s", path, error)
            continue
        hashes = [np.frombuffer(value, dtype="V32")[0] for value in known.values()]
        parts.append(index.records(list(known), {"sha256": ("V32", hashes)}))
    return parts, {}


def read_hash_list(path: Path) -> dict[str, bytes]:
    """Return {"path:size:mtime": SHA-256} of one list of file hashes. Raises OSError or ValueError
    if it is damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        found = {str(name): bytes.fromhex(value) for name, value in known.items()}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"no list of hashes: {error}") from error
    if any(len(value) != 32 for value in found.values()):
        raise ValueError("holds what is no SHA-256")
    return found
