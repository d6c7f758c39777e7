"""The key-value cache of generation, with room ahead: a step copies nothing of what is there, and
rows join and leave.

Legend: B rows, H heads, T positions, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmllm.kernels.devices import to_device

_AHEAD = 64
"""Positions of room at least."""


class Layer(DynamicLayer):
    """transformers' layer, which joins what is new to all that is there, written in place instead:
    `keys` and `values` [B, H, T, C] are the beginning of a larger `room`."""

    room: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold nothing yet, of their dtype and device. (transformers makes it of a list, and so
        waits for the device twice a layer.)"""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add float[B, H, W, C] each; all that is there now."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < end:
            room = (
                _room(key_states, len(key_states), end),
                _room(value_states, len(key_states), end),
            )
            if start and self.keys is not None and self.values is not None:
                room[0][..., :start, :] = self.keys
                room[1][..., :start, :] = self.values
            self.room = room
        keys, values = self.room
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Hold these, which nobody else writes to, in place of what is there."""
        self.keys, self.values, self.room = keys, values, None

    def gather(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Hold copies of these rows, float[B, H, T, C] each, in place of what is there; those that
        are shorter stand behind zeros."""
        self.room = _gathered(keys), _gathered(values)
        end = max(part.shape[-2] for part in keys)
        self.keys, self.values = (part[..., :end, :] for part in self.room)


class KVCache(DynamicCache):
    """transformers' cache for a model's config. Layers that forget (sliding windows, recurrent
    states) are transformers' own, and make the cache one that is not `croppable`."""

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.layers = [Layer() if type(entry) is DynamicLayer else entry for entry in self.layers]
        self.stack: Any = None
        """What runs on it in place of the model's own forward (mmllm.kernels.decoder_stack), if
        anything."""
        self.hooks: Any = None
        """Those of the model that reads it (mmllm.kernels.forward_hooks)."""
        self.was_hooked = False
        """Whether some of it was read while there was a hook."""

    @property
    def croppable(self) -> bool:
        """Whether rows and positions of it can be taken out."""
        return bool(self.layers) and all(type(entry) is Layer for entry in self.layers)

    def prefix(self, length: int) -> KVCache:
        """The first `length` positions. It shares memory with this one, until it is extended."""
        return self._made(lambda entry: entry[..., :length, :])

    def select_row(self, index: int, real: Tensor) -> KVCache:
        """A copy of one row, of the positions that `real` bool[T], on the CPU, marks."""
        places = real.nonzero()[:, 0]

        def of(entry: Tensor) -> Tensor:
            return entry[index : index + 1].index_select(2, to_device(places, entry.device))

        return self._made(of)

    def select_rows(self, rows: list[int], start: int) -> None:
        """Go on with these rows only, without the first `start` positions."""
        for layer in self._parts:
            keys, values = layer.keys[:, :, start:], layer.values[:, :, start:]
            layer.gather(
                [keys[row : row + 1] for row in rows], [values[row : row + 1] for row in rows]
            )

    def concat(self, other: KVCache) -> None:
        """Take the rows of another one in."""
        self.was_hooked = self.was_hooked or other.was_hooked
        for layer, more in zip(self._parts, other._parts, strict=True):
            layer.gather([layer.keys, more.keys], [layer.values, more.values])

    @property
    def _parts(self) -> list[Any]:
        """The layers of a cache that is `croppable`."""
        return list(self.layers)

    def _made(self, of: Callable[[Tensor], Tensor]) -> KVCache:
        """A cache of what `of` gives of each layer's keys and values."""
        made = object.__new__(KVCache)
        made.__dict__.update(self.__dict__)
        made.layers = []
        for layer in self._parts:
            part = Layer()
            part.lazy_initialization(layer.keys, layer.values)
            part.take(of(layer.keys), of(layer.values))
            made.layers.append(part)
        return made


def _room(like: Tensor, rows: int, length: int) -> Tensor:
    _, heads, _, channels = like.shape
    return like.new_empty(rows, heads, length + max(_AHEAD, length // 2), channels)


def _gathered(parts: Sequence[Tensor]) -> Tensor:
    """float[B, H, T, C] each -> room for all of their rows, which end together."""
    end = max(part.shape[-2] for part in parts)
    room = _room(parts[0], sum(map(len, parts)), end)
    for part, place in zip(parts, room.split([len(part) for part in parts]), strict=True):
        start = end - part.shape[-2]
        place[..., :start, :] = 0
        place[..., start:end, :] = part
    return room
