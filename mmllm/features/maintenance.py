"""Maintenance of a feature cache on disk: list its namespaces, verify it, prune it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmllm.errors import CacheError
from mmllm.features.namespace import read_metadata
from mmllm.features.shard import SHARD_PATTERN, keys_in, verify_shard
from mmllm.features.store import read_hash_list
from mmllm.utils import files


@dataclass(frozen=True)
class NamespaceStats:
    """The contents and size of one namespace.

    Attributes:
        kind: "features", "conditions" or "latents".
        part: the component's path in the system config.
        items: number of distinct keys.
        duplicates: number of entries whose key is in another shard too.
        bytes: size of all shards.
    """

    kind: str
    part: str
    fingerprint: str
    items: int
    duplicates: int
    shards: int
    bytes: int


def list_namespaces(folder: Path) -> list[NamespaceStats]:
    """Return the size of each namespace of a cache folder. Raises CacheError if it has none."""
    namespaces = sorted(path.parent for path in folder.glob("*/room.json"))
    if not namespaces:
        raise CacheError(f"{folder}: no feature cache there")
    sizes = []
    for namespace in namespaces:
        about, keys, total, count = read_metadata(namespace), set(), 0, 0
        shards = sorted(namespace.glob(SHARD_PATTERN))
        for shard in shards:
            found = keys_in(shard)
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
    """Read every tensor of every shard and compare it with its checksum.

    Args:
        folder: the folder of the cache.

    Returns:
        (path, reason) of each damaged file, and the shards without checksums, which earlier
        versions wrote.

    Raises:
        CacheError: the folder holds no cache.
    """
    list_namespaces(folder)
    damaged, unverified = [], []
    for path in sorted(folder.glob(f"*/{SHARD_PATTERN}")):
        try:
            if not verify_shard(path):
                unverified.append(path)
        except (OSError, ValueError) as error:
            damaged.append((path, str(error)))
    for path in sorted((folder / "files").glob("*.json")):
        try:
            read_hash_list(path)
        except (OSError, ValueError) as error:
            damaged.append((path, str(error)))
    return damaged, unverified


def prune(folder: Path, keep: set[str] | None = None) -> int:
    """Delete drafts, damaged files, shards that hold only duplicates, and unwanted namespaces.

    No other process may write to the cache meanwhile.

    Args:
        folder: the folder of the cache.
        keep: fingerprints of the namespaces to keep; None keeps all.

    Returns:
        The number of bytes freed.

    Raises:
        CacheError: the folder holds no cache.
    """
    list_namespaces(folder)
    doomed = list(folder.glob(f"*/*{files.PARTIAL}")) + [path for path, _ in verify(folder)[0]]
    for namespace in sorted(path.parent for path in folder.glob("*/room.json")):
        if keep is not None and read_metadata(namespace)["fingerprint"] not in keep:
            doomed += [file for file in namespace.iterdir() if file not in doomed]
            continue
        seen: set[str] = set()
        for shard in sorted(set(namespace.glob(SHARD_PATTERN)) - set(doomed)):
            keys = keys_in(shard)
            if keys <= seen:
                doomed.append(shard)
            seen |= keys
    freed = sum(path.stat().st_size for path in doomed)
    for path in doomed:
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    return freed
