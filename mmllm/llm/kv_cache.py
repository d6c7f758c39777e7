"""A key-value cache for generation whose layers write into preallocated buffers, and whose rows can
be selected, cropped and concatenated while replies join and leave a batch.

Legend: B rows, H heads, T positions held, W new positions, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmllm.kernels.devices import to_device

_MIN_SPARE = 64
"""Least spare positions of a buffer; a long one has half as many as it holds."""


class PreallocatedLayer(DynamicLayer):
    """A layer of transformers' cache that writes new positions in place, where transformers copies
    all that is there at every step. `keys` and `values` [B, H, T, C] are views of the first T
    positions of `buffers`."""

    buffers: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with no positions, with the dtype and device of the first states.

        (transformers' own makes a tensor of a Python list, and so waits for the device twice a
        layer.)

        Args:
            key_states: float[B, H, W, C].
            value_states: float[B, H, W, C].
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append positions.

        Args:
            key_states: float[B, H, W, C] of W new positions.
            value_states: float[B, H, W, C].
            *args: ignored; transformers passes them.
            **kwargs: ignored; transformers passes them.

        Returns:
            All keys and values, float[B, H, T + W, C] each: views that the next `update` leaves
                valid.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < end:
            buffers = (
                _allocate(key_states, len(key_states), end),
                _allocate(value_states, len(key_states), end),
            )
            if start and self.keys is not None and self.values is not None:
                buffers[0][..., :start, :] = self.keys
                buffers[1][..., :start, :] = self.values
            self.buffers = buffers
        keys, values = self.buffers
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold other tensors, without copying them.

        The next `update` copies them, so they may be views of another cache.

        Args:
            keys: float[B, H, T, C].
            values: float[B, H, T, C].
        """
        self.keys, self.values, self.buffers = keys, values, None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every row `repeats` times, the copies of a row one behind the other."""
        keys, values = self.keys, self.values
        if keys is not None and values is not None:
            self.replace(
                keys.repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)
            )

    def replace_with_copies(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Hold copies of several caches' rows as one batch; shorter ones are padded with zeros on
        the left.

        Args:
            keys: float[B, H, T, C] of each, with its own T.
            values: likewise.
        """
        self.buffers = _concat_rows(keys), _concat_rows(values)
        end = max(part.shape[-2] for part in keys)
        self.keys, self.values = (part[..., :end, :] for part in self.buffers)


class KVCache(DynamicCache):
    """The cache of one batch, for the layers that a model's config describes.

    Layers with a bounded past (sliding windows, recurrent states) are transformers' own; a cache
    with one cannot be cropped (`croppable`). transformers' `crop(-n)` removes the last n positions.
    """

    reads_all = True
    """Whether a position attends to all before it, so that rows can be joined and drafts verified
    without a change of the result."""
    chunk_length: int | None = None
    """Most positions that are computed together; None: any number."""

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.layers = [
            self.new_layer() if type(layer) is DynamicLayer else layer for layer in self.layers
        ]
        self.stack: Any = None
        """The decoder stack that extends this cache in place of the model's own forward, if any."""
        self.hooks: Any = None
        """The forward hooks of the model that fills it."""
        self.was_hooked = False
        """Whether a hook that may alter outputs was registered while this cache was filled."""

    @property
    def croppable(self) -> bool:
        """Whether rows and positions can be removed."""
        return bool(self.layers) and all(
            isinstance(layer, PreallocatedLayer) for layer in self.layers
        )

    def new_layer(self) -> PreallocatedLayer:
        """An empty layer with an unbounded past."""
        return PreallocatedLayer()

    def keep_whole(self, start: int, end: int) -> None:
        """Say which positions are one medium, before they are computed.

        Args:
            start: the first of them.
            end: the position after the last.
        """

    def prefix(self, length: int) -> KVCache:
        """The first `length` positions of all rows. Shares memory until one of the two is
        extended."""
        return self.mapped(lambda states: states[..., :length, :])

    def select_row(self, index: int, real: Tensor) -> KVCache:
        """Return a copy of one row, without its padding.

        Args:
            index: the row.
            real: bool[T] on the CPU: the positions to copy.
        """
        positions = real.nonzero()[:, 0]

        def select(states: Tensor) -> Tensor:
            return states[index : index + 1].index_select(2, to_device(positions, states.device))

        return self.mapped(select)

    def select_rows(self, rows: list[int], start: int) -> None:
        """Keep only some rows, in place.

        Args:
            rows: the rows to keep, in order.
            start: how many of the first positions to drop.
        """
        for layer in self._layers():
            keys, values = layer.keys[:, :, start:], layer.values[:, :, start:]
            layer.replace_with_copies(
                [keys[row : row + 1] for row in rows], [values[row : row + 1] for row in rows]
            )

    def concat(self, other: KVCache) -> None:
        """Append the rows of another cache."""
        self.was_hooked = self.was_hooked or other.was_hooked
        for layer, more in zip(self._layers(), other._layers(), strict=True):
            layer.replace_with_copies([layer.keys, more.keys], [layer.values, more.values])

    def _layers(self) -> list[Any]:
        """The layers of a croppable cache; typed Any, for transformers' keys may be None."""
        return list(self.layers)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> KVCache:
        """A new cache whose keys and values are a function of this one's.

        Args:
            function: float[B, H, T, C] -> the same of other rows, or of fewer positions.
        """
        mapped = object.__new__(type(self))
        mapped.__dict__.update(self.__dict__)
        mapped.layers = []
        for layer in self._layers():
            copy = self.new_layer()
            copy.lazy_initialization(layer.keys, layer.values)
            copy.replace(function(layer.keys), function(layer.values))
            mapped.layers.append(copy)
        return mapped


def _allocate(like: Tensor, rows: int, length: int) -> Tensor:
    """An uninitialised buffer float[rows, H, length and some more, C]."""
    _, heads, _, channels = like.shape
    return like.new_empty(rows, heads, length + max(_MIN_SPARE, length // 2), channels)


def _concat_rows(parts: Sequence[Tensor]) -> Tensor:
    """float[B, H, T, C] each -> one buffer with all rows, aligned at their last position."""
    end = max(part.shape[-2] for part in parts)
    buffer = _allocate(parts[0], sum(map(len, parts)), end)
    for part, rows in zip(parts, buffer.split([len(part) for part in parts]), strict=True):
        start = end - part.shape[-2]
        rows[..., :start, :] = 0
        rows[..., start:end, :] = part
    return buffer
