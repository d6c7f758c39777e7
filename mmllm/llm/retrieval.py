"""A key-value cache of which a step reads the first positions, the last ones, and those older
blocks whose mean keys fit its queries best.

All keys and values are kept, but what a token costs does not grow with them. Blocks are found
without training, as in InfLLM (Xiao et al. 2024); the first positions are always read, as attention
sinks (Xiao et al. 2023). What is read moves together: keys are rotated (RoPE) as if nothing lay
between them, so that no distance is longer than the model has learned, however long the text is.

Legend: H heads, K key-value heads, E their width, W new positions, T all positions, N blocks,
M of them read, L positions of the longest one.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmllm.llm.kv_cache import KVCache, PreallocatedLayer
from mmllm.llm.memory import MemoryOptions

NUM_SINKS = 4
"""First positions that every step reads (Xiao et al. 2023)."""
CHUNK_LENGTH = 128
"""Positions of a prompt that are computed together, and choose blocks together."""


@dataclass(frozen=True)
class Blocks:
    """The N blocks that lie before the window.

    Attributes:
        starts: int[N].
        lengths: int[N].
        longest: L, the largest of them.
        are_equal: whether all have this length.
        first: where the first one begins, behind the sinks.
        end: where the last one ends.
    """

    starts: Tensor
    lengths: Tensor
    longest: int
    are_equal: bool
    first: int
    end: int


class BlockTable:
    """Where the blocks of one conversation begin and end, which is the same in all layers.

    Attributes:
        media: (start, end) of each medium; one has to be here before its positions are computed.
    """

    def __init__(self, options: MemoryOptions, inv_freq: Tensor, media: list[tuple[int, int]]):
        self.options = options
        self.inv_freq = inv_freq
        self.media = media
        self._ends: list[int] = []
        self._latest: Blocks | None = None

    def count(self, length: int) -> int:
        """How many blocks the first `length` positions hold, behind the sinks."""
        while (end := self._next_end()) <= length:
            self._ends.append(end)
        return max(bisect.bisect_right(self._ends, length) - 1, 0)

    def before_window(self, length: int) -> Blocks | None:
        """The blocks before the window of a text of `length` positions; None: there are none."""
        num = self.count(length - self.options.window)
        if num and (self._latest is None or len(self._latest.starts) != num):
            ends = torch.tensor(self._ends[: num + 1], device=self.inv_freq.device)
            lengths = ends.diff()
            longest = int(lengths.max())
            are_equal = bool((lengths == longest).all())
            first, end = self._ends[0], self._ends[num]
            self._latest = Blocks(ends[:-1], lengths, longest, are_equal, first, end)
        return self._latest if num else None

    def _next_end(self) -> int:
        """The end of the sinks, or of the next block: one that cuts no medium."""
        start = self._ends[-1] if self._ends else 0
        end = start + (self.options.block if self._ends else NUM_SINKS)
        for first, last in self.media:
            if first < end < last:
                return first if first > start else last
        return end


class RetrievalLayer(PreallocatedLayer):
    """One layer's keys and values, with the mean key of each block. It holds one row."""

    def __init__(self, table: BlockTable):
        super().__init__()
        self.table = table
        self.means: Tensor | None = None
        """float[K, blocks so far, E], of keys that are not rotated."""
        self.num_read = 0
        """Positions that the last call of `retrieve` read."""

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold other tensors; see `PreallocatedLayer.replace`."""
        super().replace(keys, values)
        self.means = None

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the last W positions read.

        Args:
            queries: float[1, H, W, E] of the positions that were added last.

        Returns:
            Keys and values float[1, K, S, E] of the S positions that are read, and the mask
            bool[1, 1 or H, W, S]; None where every query reads all.
        """
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[0], self.values[0]  # [K, T, E]
        width, device = queries.shape[2], keys.device
        first_query = keys.shape[1] - width
        blocks = self.table.before_window(first_query + 1)
        if blocks is None:
            self.num_read = keys.shape[1]
            return self.keys, self.values, _causal(width, keys.shape[1], device)
        chosen = self._choose(queries[0], first_query, blocks)  # [K, M]
        starts, lengths = (part.to(device)[chosen] for part in (blocks.starts, blocks.lengths))
        offsets = torch.arange(blocks.longest, device=device)
        index = (starts[..., None] + offsets).clamp(max=first_query)  # [K, M, L]
        heads = torch.arange(len(keys), device=device)[:, None, None]
        # They move up to the window, and the sinks up to them.
        new_starts = blocks.end - lengths.flip(-1).cumsum(-1).flip(-1)
        read = self._shift(keys[heads, index], (new_starts - starts)[..., None])
        sinks = self._shift(keys[:, : blocks.first], new_starts[:, :1] - blocks.first)
        keys = torch.cat([sinks, read.flatten(1, 2), keys[:, blocks.end :]], dim=1)
        read = values[heads, index].flatten(1, 2)
        values = torch.cat([values[:, : blocks.first], read, values[:, blocks.end :]], dim=1)
        mask = _causal(width, keys.shape[1], device)
        self.num_read = keys.shape[1]
        if not blocks.are_equal:
            is_read = torch.ones(len(keys), 1, keys.shape[1], dtype=torch.bool, device=device)
            padded = (offsets < lengths[..., None]).flatten(1)
            is_read[:, 0, blocks.first : blocks.first + padded.shape[1]] = padded
            is_read = is_read.repeat_interleave(queries.shape[1] // len(keys), dim=0)[None]
            mask = is_read if mask is None else mask & is_read
        return keys[None], values[None], mask

    def _choose(self, queries: Tensor, first_query: int, blocks: Blocks) -> Tensor:
        """The blocks whose mean keys fit queries float[H, W, E] best: int[K, M], in order."""
        means = self._means(blocks)  # [K, N, E]
        heads, width, _ = queries.shape
        positions = torch.arange(first_query, first_query + width, device=queries.device)
        queries = self._shift(queries, -positions[None])
        queries = queries.view(len(means), heads // len(means) * width, -1)
        scores = torch.bmm(queries, means.transpose(1, 2)).amax(1)  # [K, N]
        num = min(self.table.options.blocks, means.shape[1])
        return scores.topk(num).indices.sort().values

    def _means(self, blocks: Blocks) -> Tensor:
        """The mean keys of N blocks, float[K, N, E]; those that are new are computed."""
        assert self.keys is not None
        num = len(blocks.starts)
        known = 0 if self.means is None else self.means.shape[1]
        if known < num:
            start = int(blocks.starts[known])
            keys = self.keys[0, :, start : blocks.end]
            positions = torch.arange(start, blocks.end, device=keys.device)
            keys = self._shift(keys.float(), -positions[None])
            lengths = blocks.lengths[known:].to(keys.device)
            owner = torch.arange(num - known, device=keys.device).repeat_interleave(lengths)
            means = keys.new_zeros(len(keys), num - known, keys.shape[-1])
            means = means.index_add_(1, owner, keys) / lengths[:, None]
            means = means.to(self.keys.dtype)
            self.means = means if self.means is None else torch.cat([self.means, means], dim=1)
        assert self.means is not None
        return self.means[:, :num]

    def _shift(self, states: Tensor, distance: Tensor) -> Tensor:
        """Rotate float[..., E] by a distance int[...] in positions, as RoPE does."""
        angles = distance[..., None] * self.table.inv_freq.to(states.device)
        cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
        first, second = states.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RetrievalCache(KVCache):
    """The cache of one conversation with memory. Its rows are never joined with others'."""

    reads_all = False
    chunk_length = CHUNK_LENGTH

    def __init__(self, config: Any, options: MemoryOptions, inv_freq: Tensor):
        self.table = BlockTable(options, inv_freq, [])
        super().__init__(config)

    def new_layer(self) -> RetrievalLayer:
        """An empty layer of this cache."""
        return RetrievalLayer(self.table)

    def keep_whole(self, start: int, end: int) -> None:
        """Say that a medium has the positions from `start` to `end`, before these are computed."""
        if (start, end) not in self.table.media:
            self.table.media.append((start, end))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> KVCache:
        """A cache whose keys and values are a function of this one's; see `KVCache.mapped`. It may
        hold fewer positions, of which it shares nothing that changes."""
        copy: Any = super().mapped(function)
        length = copy.get_seq_length()
        media = [medium for medium in self.table.media if medium[1] <= length]
        copy.table = BlockTable(self.table.options, self.table.inv_freq, media)
        num = copy.table.count(length)
        own_layers: list[Any] = self.layers
        for layer, own in zip(copy.layers, own_layers, strict=True):
            layer.table = copy.table
            layer.means = None if own.means is None else own.means[:, :num]
        return copy


def _causal(width: int, length: int, device: torch.device) -> Tensor | None:
    """The mask of the last `width` of `length` positions: bool[1, 1, W, T]; None for one."""
    if width == 1:
        return None
    ones = torch.ones(width, length, dtype=torch.bool, device=device)
    return ones.tril(length - width)[None, None]
