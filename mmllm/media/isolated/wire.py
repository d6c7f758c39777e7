"""The messages between a process and its decoding worker: JSON and raw arrays, never pickles.

A message is two lengths, a JSON object, and bytes: a file in a request, arrays in a response.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

_LENGTHS = struct.Struct(">QQ")
_DTYPES = {"u1": np.uint8, "f4": np.float32}

OWN_MEMORY = 2**30
"""Bytes of memory that a worker may use in addition to the decoded arrays: its libraries, the file,
and intermediate arrays (RGBA, float)."""


def send(pipe: Any, header: dict[str, Any], *body: Any) -> None:
    """Write a message: the lengths, a JSON object, and concatenated buffers.

    Args:
        pipe: the binary stream, flushed afterwards.
        header: the JSON object.
        *body: buffers (bytes, arrays) whose bytes follow it.
    """
    text = json.dumps(header).encode()
    pipe.write(_LENGTHS.pack(len(text), sum(memoryview(part).nbytes for part in body)))
    pipe.write(text)
    for part in body:
        pipe.write(memoryview(part).cast("B"))
    pipe.flush()


def receive(pipe: BinaryIO, max_bytes: int) -> tuple[dict[str, Any], bytearray]:
    """Read a message that `send` wrote.

    Args:
        pipe: the binary stream.
        max_bytes: the largest message that is read, JSON and buffers together.

    Returns:
        The JSON object, and the bytes of all buffers.

    Raises:
        EOFError: the pipe has ended, or the message is larger than `max_bytes`.
    """
    num_text, num_data = _LENGTHS.unpack(_read_exactly(pipe, _LENGTHS.size))
    if num_text + num_data > max_bytes:
        raise EOFError
    return json.loads(_read_exactly(pipe, num_text)), _read_exactly(pipe, num_data)


def describe_arrays(arrays: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Return the dtype and shape of each array, for the header of a message."""
    return [{"dtype": array.dtype.str[1:], "shape": list(array.shape)} for array in arrays]


def split_arrays(descriptions: Sequence[dict[str, Any]], data: bytearray) -> list[np.ndarray]:
    """Return the arrays that are concatenated in a message, as views of its bytes.

    Args:
        descriptions: `dtype` and `shape` of each array, in order.
        data: the bytes of all arrays.

    Raises:
        KeyError: a dtype is none of those that workers send.
        ValueError: there are too few bytes.
    """
    arrays, start = [], 0
    for entry in descriptions:
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
        count = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(data, dtype, count, start).reshape(shape))
        start += count * dtype.itemsize
    return arrays


def _read_exactly(pipe: BinaryIO, length: int) -> bytearray:
    data = bytearray(length)
    view, start = memoryview(data), 0
    while start < length:
        num = pipe.readinto(view[start:])  # pyright: ignore[reportAttributeAccessIssue]
        if not num:
            raise EOFError
        start += num
    return data
