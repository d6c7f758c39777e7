"""The format of a shard: a safetensors file of tensors named "<key>/<name>", with their checksums.

The checksum of a tensor is the CRC-32 of its bytes, name, dtype and shape. A shard is written once,
atomically, and never changed.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.features import index
from mmllm.utils import files
from mmllm.weights import save_tensors

logger = logging.getLogger(__name__)

SHARD_PATTERN = "*.safetensors"
_CHECKSUMS = "crc32"
"""Key of a shard's metadata that holds JSON {tensor: checksum}. Shards of earlier versions lack it.
"""
NO_CHECKSUM = -1
"""Value in an index for a tensor that has no checksum."""
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
"""The name of each dtype in safetensors -> the dtype in torch."""


@dataclass(frozen=True)
class TensorLocation:
    """The location of one tensor: `offset` bytes into `shard`; `dtype` is a key of `DTYPES`."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    checksum: int


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard of the cache atomically, with a checksum for every tensor.

    Args:
        path: the safetensors file.
        tensors: tensors by "<key>/<name>".

    Raises:
        OSError: the file cannot be written.
    """
    sums = {name: _tensor_checksum(name, value) for name, value in tensors.items()}
    with files.atomic_file(path) as draft:
        save_tensors(tensors, draft, {_CHECKSUMS: json.dumps(sums)})


def tensors_in(path: Path) -> list[tuple[str, TensorLocation]]:
    """Read the header of a shard: (full name, location) of each tensor.

    Raises:
        OSError: the file cannot be read.
        ValueError: the header is damaged, or the file has another size than it implies.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        end = 8 + length
        if end > size:
            raise ValueError("no safetensors header")
        head = json.loads(stream.read(length))
    try:
        metadata = head.pop("__metadata__", None)  # absent in shards of earlier versions
        sums = dict.fromkeys(head, NO_CHECKSUM)
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
            end = max(end, place.offset + math.prod(place.shape) * DTYPES[place.dtype].itemsize)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"its header is damaged: {error!r}") from error
    if end != size:
        raise ValueError("it is cut off, or longer than its header says")
    return places


def keys_in(path: Path) -> set[str]:
    """Return the keys of the entries in a shard; no keys if it is damaged."""
    try:
        return {name.partition("/")[0] for name, _ in tensors_in(path)}
    except (OSError, ValueError):
        return set()


def verify_shard(path: Path) -> bool:
    """Compare every tensor of a shard with its checksum, and check that all values are finite.

    Returns:
        Whether the shard has checksums; those of earlier versions have none.

    Raises:
        OSError: the file cannot be read.
        ValueError: the shard is damaged.
    """
    known = True
    with path.open("rb") as stream:
        for name, place in tensors_in(path):
            dtype = DTYPES[place.dtype]
            stream.seek(place.offset)
            data = bytearray(stream.read(math.prod(place.shape) * dtype.itemsize))
            if place.checksum == NO_CHECKSUM:
                known = False
            elif place.checksum != checksum(name, place.dtype, place.shape, data):
                raise ValueError(f"{name} has another checksum than was written")
            if data and not torch.frombuffer(data, dtype=dtype).isfinite().all():
                raise ValueError(f"{name} holds values that are not finite")
    return known


def index_shards(paths: list[Path]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Build the records of an index of shards, one per tensor: file, layout, offset, checksum.

    Args:
        paths: the shards; damaged ones are skipped with a warning.

    Returns:
        Arrays of records, and the header of the index: file names, tensor names, and layouts
        (dtype and shape).
    """
    layouts: dict[tuple[str, tuple[int, ...]], int] = {}
    names: dict[str, None] = {}
    parts = []
    for number, path in enumerate(paths):
        try:
            found = tensors_in(path)
        except (OSError, ValueError) as error:
            warn_damaged(path, error)
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


def _tensor_checksum(name: str, value: Tensor) -> int:
    value = value.detach().cpu().contiguous()
    dtype = next(word for word, kind in DTYPES.items() if kind == value.dtype)
    data = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
    return checksum(name, dtype, tuple(value.shape), data)


def checksum(name: str, dtype: str, shape: tuple[int, ...], data: Any) -> int:
    """Return the CRC-32 of a tensor's bytes, name, dtype and shape: damage to a header or an index
    is detected like damage to the data.

    Args:
        name: "<key>/<name>".
        dtype: a key of `DTYPES`.
        shape: the tensor's shape.
        data: its bytes, as any buffer.
    """
    return zlib.crc32(data, zlib.crc32(f"{name} {dtype} {list(shape)}".encode()))


@functools.lru_cache(maxsize=256)
def open_shard(path: Path) -> io.FileIO:
    """Open a shard for reading and keep it open; a shard never changes once it is written."""
    return io.FileIO(path)


def warn_damaged(path: Path, error: object) -> None:
    """Log a warning that a damaged shard is skipped.

    Args:
        path: the shard.
        error: what is wrong with it.
    """
    logger.warning("passing over a damaged shard of the cache: %s: %s", path, error)
