"""The layout of sequences that are packed into one row: groups of similar length, and the index
tables, masks and biases of their attention (mmllm.kernels.packed_attention).

Legend: T positions of the pack, C sequences of a group, P positions of the prefix that they attend
to, S positions of the group's longest sequence after the prefix, L = P + S; N rows of all groups:
C * S summed over groups for queries, C * L for keys; H heads, K key-value heads, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmllm.kernels.devices import to_device

GROUP_OVERHEAD = 20_000
"""What one group more costs on a CPU, as the number of query-key pairs that take the same time."""
LENGTH_MULTIPLE = 4
"""L is rounded up to a multiple of it: products of odd widths take a fifth longer on a CPU."""


@dataclass(frozen=True, eq=False)
class PackGroup:
    """C sequences of similar length.

    Args:
        prefix_len: P, the positions of the prefix that they attend to.
        positions: int[C, S], where their tokens are in the pack; anything where not `valid`.
        valid: bool[C, S], False behind the end of a shorter sequence.
    """

    prefix_len: int
    positions: Tensor
    valid: Tensor

    @property
    def num_sequences(self) -> int:
        """C"""
        return len(self.positions)

    @property
    def num_queries(self) -> int:
        """S"""
        return self.positions.shape[1]

    @property
    def num_keys(self) -> int:
        """L"""
        return self.prefix_len + self.num_queries


@dataclass(frozen=True)
class RowIndex:
    """The mapping between T rows of the pack and N rows of the groups. With heads, each row is that
    of one head.

    Args:
        to_groups: int[N], the pack's row that each row of the groups holds.
        to_pack: int[T], a row of the groups that holds each row of the pack.
        padding: The rows of the groups that hold none.
        prefix_copies: int[C, P] over all groups, the rows that hold a copy of the prefix.
    """

    to_groups: Tensor
    to_pack: Tensor
    padding: Tensor
    prefix_copies: Tensor

    def scatter(self, rows: Tensor) -> Tensor:
        """Copy the pack's rows to the groups: float[T, E] -> float[N, E], padding undefined."""
        return rows.index_select(0, self.to_groups)

    def gather(self, rows: Tensor) -> Tensor:
        """Copy the groups' rows back to the pack: float[N, E] -> float[T, E]"""
        return rows.index_select(0, self.to_pack)

    def gather_sum(self, rows: Tensor) -> Tensor:
        """Sum all copies of each row of the pack, the gradient of `scatter`: float[N, E] ->
        float[T, E]"""
        total = self.gather(rows)
        if prefix_len := self.prefix_copies.shape[1]:
            copies = rows.index_select(0, self.prefix_copies.flatten())
            total[:prefix_len] += copies.view(*self.prefix_copies.shape, -1).sum(0)
        return total


GroupSplit = tuple[list[int], list[int]]
"""The number of rows of each group, and the number of batched matrix products that they make: one
for each sequence and key-value head."""


class PackLayout:
    """Which position of a pack belongs to which sequence, with the index tables, masks and biases
    of its groups, which all layers of one forward pass share.

    Args:
        groups: Groups of sequences; a shared prefix is a group of its own.
        device: Where the tables are.
    """

    def __init__(self, groups: Sequence[PackGroup], device: torch.device):
        self.groups = tuple(groups)
        self.device = device
        self._cache: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def build(cls, seq_lens: Sequence[int], prefix_len: int, device: torch.device) -> PackLayout:
        """Group the sequences of a pack by length, without waiting for the device.

        Args:
            seq_lens: The length of each sequence, in the pack's order, without the prefix.
            prefix_len: Length of the prefix that all of them share, at the start of the pack.
            device: The device of the hidden states.
        """
        order = sorted(range(len(seq_lens)), key=lambda index: -seq_lens[index])
        lengths = torch.tensor(seq_lens)
        starts = prefix_len + lengths.cumsum(0) - lengths
        groups = []
        if prefix_len:
            groups.append(_build_group(torch.tensor([0]), torch.tensor([prefix_len]), 0))
        for size in group_sizes([seq_lens[index] for index in order], prefix_len, device):
            members, order = torch.tensor(order[:size]), order[size:]
            groups.append(_build_group(starts[members], lengths[members], prefix_len))
        return cls(groups, device)

    def row_index(self, heads: int, *, keys: bool) -> RowIndex:
        """Return where the rows of the pack are in the groups.

        Args:
            heads: heads per position; each has a row of its own.
            keys: True for keys [C, heads, L] of the groups, False for queries [C, heads, S].

        Returns:
            The mapping of T * heads rows.
        """
        return self._cached(_build_row_index, self.groups, heads, keys, self.device)

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """Return what each position of a group attends to.

        Args:
            index: the group.
            window: positions that sliding-window attention reaches back; None: all.

        Returns:
            bool[1, 1, S, L]; None if that is plain causal attention.
        """
        group = self.groups[index]
        if group.prefix_len == 0 and (window is None or group.num_queries <= window):
            return None
        return self._cached(causal_mask, group.num_queries, group.num_keys, window, self.device)

    def bias(self, index: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what each position of a group attends to, as an additive bias of scores.

        Args:
            index: the group.
            window: positions that sliding-window attention reaches back; None: all.
            dtype: that of the scores.

        Returns:
            float[1, 1, S, L].
        """
        group = self.groups[index]
        return self._cached(
            _causal_bias, group.num_queries, group.num_keys, window, self.device, dtype
        )

    def splits(self, heads: int, kv_heads: int) -> tuple[GroupSplit, GroupSplit]:
        """Return how rows of queries and rows of keys are split into groups.

        Args:
            heads: heads of queries.
            kv_heads: heads of keys and values.
        """
        return self._cached(_build_splits, self.groups, heads, kv_heads)

    def _cached(self, build: Callable[..., Any], *args: Any) -> Any:
        """Return build(*args), computed once for all layers."""
        if (build, *args) not in self._cache:
            self._cache[build, *args] = build(*args)
        return self._cache[build, *args]


def group_sizes(lengths: Sequence[int], prefix_len: int, device: torch.device) -> list[int]:
    """Split sequences into groups with the least padding, where a group is worth its own calls.

    Args:
        lengths: Of the sequences without the prefix, the longest first.
        prefix_len: Length of the shared prefix.
        device: An accelerator, whose calls cost more than padding, gets one group.

    Returns:
        The number of sequences of each group, in the order of `lengths`.
    """
    if device.type != "cpu":
        return [len(lengths)]
    best = [(0, 0)]  # for the first n sequences: (cost, size of the last group)
    for stop in range(1, len(lengths) + 1):
        best.append(
            min(
                (
                    best[start][0]
                    + (stop - start) * lengths[start] * (prefix_len + lengths[start])
                    + GROUP_OVERHEAD,
                    stop - start,
                )
                for start in range(stop)
            )
        )
    sizes, stop = [], len(lengths)
    while stop:
        sizes.append(best[stop][1])
        stop -= sizes[-1]
    return sizes[::-1]


def _build_group(starts: Tensor, lengths: Tensor, prefix_len: int) -> PackGroup:
    """Make the group of sequences that start at int[C] with int[C] positions, the longest first."""
    num_keys = -(-(prefix_len + int(lengths[0])) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    columns = torch.arange(num_keys - prefix_len)
    valid = columns < lengths[:, None]
    return PackGroup(prefix_len, torch.where(valid, starts[:, None] + columns, 0), valid)


def _build_row_index(
    groups: tuple[PackGroup, ...], heads: int, keys: bool, device: torch.device
) -> RowIndex:
    """Build the tables of `PackLayout.row_index` on the CPU and copy them to the device."""
    positions, valids, prefix_copies, offset = [], [], [], 0
    head = torch.arange(heads)[:, None]
    for group in groups:
        position, valid = group.positions, group.valid
        if keys:
            prefix = torch.arange(group.prefix_len).expand(group.num_sequences, -1)
            position = torch.cat([prefix, position], dim=1)
            valid = torch.cat([torch.zeros_like(prefix, dtype=torch.bool), valid], dim=1)
            num_rows = group.num_sequences * heads * group.num_keys
            if group.prefix_len:
                rows = (offset + torch.arange(num_rows)).view(group.num_sequences, heads, -1)
                rows = rows[:, :, : group.prefix_len]
                prefix_copies.append(rows.transpose(1, 2).flatten(1))
            offset += num_rows
        positions.append((position[:, None] * heads + head).flatten())
        valids.append(valid[:, None].expand(-1, heads, -1).flatten())
    to_groups, valid = torch.cat(positions), torch.cat(valids)
    to_pack = torch.empty(int(valid.sum()), dtype=torch.long)
    to_pack[to_groups[valid]] = valid.nonzero().flatten()
    copies = torch.cat(prefix_copies) if prefix_copies else torch.empty(0, 0, dtype=torch.long)
    tables = to_groups, to_pack, (~valid).nonzero().flatten(), copies
    return RowIndex(*(to_device(table, device) for table in tables))


def _build_splits(
    groups: tuple[PackGroup, ...], heads: int, kv_heads: int
) -> tuple[GroupSplit, GroupSplit]:
    products = [group.num_sequences * kv_heads for group in groups]
    query_rows = [group.num_sequences * heads * group.num_queries for group in groups]
    key_rows = [group.num_sequences * kv_heads * group.num_keys for group in groups]
    return (query_rows, products), (key_rows, products)


def causal_mask(
    num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> Tensor:
    """Return which positions each of the last ones attends to: itself and those before it.

    Args:
        num_queries: S, the last positions.
        num_keys: L, all positions.
        window: at most so many positions, itself included; None: all.
        device: the device of the mask.

    Returns:
        bool[1, 1, S, L].
    """
    positions = torch.arange(num_keys, device=device)
    distance = positions[num_keys - num_queries :, None] - positions
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return mask[None, None]


def mask_to_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask to an additive bias of scores.

    Args:
        mask: True where a position is attended to.
        dtype: that of the scores.

    Returns:
        0 where the mask is True, elsewhere a number so low that its softmax is 0, and still finite
        in a row that is masked wholly.
    """
    lowest = torch.finfo(dtype).min / 2
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)


def _causal_bias(
    num_queries: int, num_keys: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    return mask_to_bias(causal_mask(num_queries, num_keys, window, device), dtype)
