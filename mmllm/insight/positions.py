"""What stands at the positions of a forward pass of the LLM: text, media, signal spans.

Legend: B rows, T positions of a row, P positions, V text vocabulary, R signal tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from mmllm.model import AnyToAny
from mmllm.tokens import Sources

GROUPS = ("all", "text", "media", "signal")
"""What `Positions.select` takes besides the name of a modality."""


@dataclass(frozen=True)
class Positions:
    """What stands at each of P positions.

    Attributes:
        conversation: int[P], numbered in the order in which the conversations were first seen.
        index: int[P], the position within its conversation.
        token: int[P], the token id; -1 for an embedding of a medium.
        kind: str[P], "text"; the modality of a medium that is read, "image" say; or "signal".
        modality: str[P], that of the medium that is read or made there; "" for text.
        medium: int[P], the number of that medium within its conversation; -1 for text.
    """

    conversation: np.ndarray
    index: np.ndarray
    token: np.ndarray
    kind: np.ndarray
    modality: np.ndarray
    medium: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, selection: np.ndarray | slice) -> Positions:
        """Some of the positions.

        Args:
            selection: bool[P], int[P'], or a slice.
        """
        return Positions(*(getattr(self, entry.name)[selection] for entry in fields(self)))

    def select(self, which: str) -> np.ndarray:
        """Find the positions of one group: bool[P].

        Args:
            which: "all", "text", "media" (all that is read), "signal", or a modality: what is read
                or made of it.
        """
        if which == "all":
            return np.ones(len(self), dtype=bool)
        if which == "media":
            return ~np.isin(self.kind, ("text", "signal"))
        return (self.kind == which) | (self.modality == which)

    @classmethod
    def concat(cls, parts: Sequence[Positions]) -> Positions:
        """Put positions one behind the other.

        Args:
            parts: at least one.
        """
        return cls(
            *(
                np.concatenate([getattr(part, entry.name) for part in parts])
                for entry in fields(cls)
            )
        )


@dataclass
class PassReader:
    """Reads the positions of successive forward passes, with conversations numbered throughout.

    Attributes:
        model: the model.
    """

    model: AnyToAny
    _owners: dict[int, tuple[object, int]] = field(default_factory=dict)
    """Identity of an owner -> the owner, kept alive, and the number of its conversation."""
    _num_conversations: int = 0
    _num_media: dict[int, int] = field(default_factory=dict)
    """Conversation -> media that began in it so far."""

    def read(
        self,
        shape: tuple[int, int],
        sources: Sources | None,
        mask: Tensor | None,
        positions: Tensor | None,
        prefix_len: int,
        seq_lens: Sequence[int],
    ) -> tuple[Positions, np.ndarray]:
        """Read one forward pass.

        Args:
            shape: (B, T).
            sources: what the embeddings stand for; None: text of unknown ids (-1).
            mask: bool[B, T (+ cached)], False at padding; read without `sources` only.
            positions: int[B, T]; None: counted from 0.
            prefix_len: length of a pack's shared prefix.
            seq_lens: lengths of a pack's sequences.

        Returns:
            The positions of all B * T, padding included, and which are none: bool[B * T].
        """
        rows, width = shape
        if sources is not None:
            ids = sources.ids.cpu().numpy().reshape(-1)
            is_real = ids >= 0
        else:
            ids = np.full(rows * width, -1)
            is_real = np.ones(rows * width, dtype=bool)
            if mask is not None:
                is_real = mask[:, -width:].cpu().numpy().reshape(-1).astype(bool)
        if positions is None:
            index = np.tile(np.arange(width), rows)
        else:
            index = positions.expand(rows, -1).cpu().numpy().reshape(-1)
        if seq_lens:
            lengths = [prefix_len + seq_lens[0], *seq_lens[1:]]
            row_of = np.repeat(np.arange(len(lengths)), lengths)
        else:
            row_of = np.repeat(np.arange(rows), width)
        numbers = self._numbers(sources.owners if sources else (), int(row_of[-1]) + 1)
        conversation = numbers[row_of]
        token, kind, modality, medium = self._media(ids, conversation)
        return Positions(conversation, index, token, kind, modality, medium), is_real

    def _numbers(self, owners: Sequence[object], rows: int) -> np.ndarray:
        """The number of each row's conversation: int[rows]"""
        numbers = []
        for row in range(rows):
            owner = owners[row] if owners else object()
            known = self._owners.get(id(owner))
            if known is None:
                known = owner, self._num_conversations
                self._num_conversations += 1
                if owners:
                    self._owners[id(owner)] = known
            numbers.append(known[1])
        return np.array(numbers)

    def _media(self, ids: np.ndarray, conversation: np.ndarray) -> tuple[np.ndarray, ...]:
        """`token`, `kind`, `modality` and `medium` of all positions."""
        tokens = self.model.llm.tokens
        token, medium = ids.copy(), np.full(len(ids), -1)
        kind = np.full(len(ids), "text", dtype=object)
        modality = np.full(len(ids), "", dtype=object)
        starts = np.zeros(len(ids), dtype=bool)
        for number, (key, encoder) in enumerate(self.model.encoders.items()):
            where = np.flatnonzero(ids == tokens.placeholder_id + number)
            token[where] = -1
            kind[where] = modality[where] = encoder.modality
            # Embeddings of a medium are never split: not by passes, nor by rows.
            if encoder.modality in self.model.renderer.layouts:  # as many as the medium needs
                starts[where[np.diff(where, prepend=-2) > 1]] = True
            else:
                starts[where[:: self.model.num_input_tokens[key]]] = True
        for key, decoder in self.model.decoders.items():
            span = tokens.signal_ids(key)
            where = np.flatnonzero((ids >= span[0]) & (ids <= span[-1]))
            kind[where], modality[where] = "signal", decoder.modality
            starts[ids == span[0]] = True
        for at in np.flatnonzero(kind != "text"):
            own = conversation[at]
            self._num_media[own] = self._num_media.get(own, 0) + int(starts[at])
            medium[at] = self._num_media[own] - 1
        return token, kind, modality, medium


def backbone_index(
    shape: tuple[int, int],
    width: int,
    start: int,
    prefix_len: int,
    seq_lens: Sequence[int],
) -> np.ndarray:
    """Find which positions of a forward pass one call of the backbone computes.

    Kernels and families differ in how a pass is computed: as it is; a shared prefix for one row and
    then what follows it for all; piece by piece; or a pack as one padded row per sequence.

    Args:
        shape: (b, t) of the embeddings that the backbone was called with.
        width: T of the pass.
        start: how many positions of each row were computed by earlier calls.
        prefix_len: the length of a pack's shared prefix.
        seq_lens: lengths of a pack's sequences.

    Returns:
        int[b * t] into the B * T positions; -1 at padding.
    """
    if not seq_lens or shape == (1, width):
        columns = np.arange(start, start + shape[1])
        return (np.arange(shape[0])[:, None] * width + columns).reshape(-1)
    index = np.full(shape, -1)
    index[:, :prefix_len] = np.arange(prefix_len)
    end = prefix_len
    for row, length in enumerate(seq_lens):
        index[row, prefix_len : prefix_len + length] = np.arange(end, end + length)
        end += length
    return index.reshape(-1)


def is_first(index: np.ndarray) -> np.ndarray:
    """Whether each entry of int[N] is the first of its value, and none of those that are -1."""
    first = np.zeros(len(index), dtype=bool)
    first[np.unique(index, return_index=True)[1]] = True
    return first & (index >= 0)


def rows_of(states: Tensor, index: np.ndarray) -> Tensor:
    """Gather rows: float[N, …] -> float[P, …].

    Args:
        states: the rows.
        index: int[P], which of them.
    """
    if len(index) == len(states) and (index == np.arange(len(index))).all():
        return states
    return states[torch.from_numpy(index).to(states.device)]
