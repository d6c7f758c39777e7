"""Rendered conversations -> one batch of tensors.

Legend: B rows, T positions, M media of one key in the batch (may be 0), N placeholders a medium,
K signal tokens a medium, P supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from mmllm.conversation import Medium
from mmllm.data.rendering import UNSUPERVISED, Rendered, num_shared
from mmllm.precision import moved

ALIGNED = 16
"""A pack's positions are a multiple of it: a CPU takes longer for bfloat16 products of other
heights, and has to make ready for each height that it has not seen."""


@dataclass
class InputMedia:
    """Input media of one encoder: raw `samples` float[M, *S] or ready `features` float[M, L, C]
    (`feature_mask` bool[M, L] or None), and their flat `places` int[M * N] in B * T."""

    places: Tensor
    samples: Tensor | None = None
    features: Tensor | None = None
    feature_mask: Tensor | None = None


@dataclass
class OutputMedia:
    """Output media of one decoder: flat `places` int[M, K], the alignment `targets` by tensor
    name, `latents` float[M, …] for the denoising loss (None without it), and M `seeds` that name
    the noise of each item (numbers, which the host needs)."""

    places: Tensor
    targets: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    seeds: tuple[int, ...] = ()


@dataclass
class Batch:
    """`ids` int[B, T]; `mask` bool[B, T] or None when packed; `positions` int[B, T];
    `supervised` int[P]: flat positions whose hidden state predicts `labels` int[P]; `shared`: the
    first positions that are the same text in every conversation. `packed`: the one row holds them
    once and then conversations of these lengths, the last of which may be so much `padding`.
    `plain` int[W, S]: windows of plain text beside the conversations, for the loss `kl`."""

    ids: Tensor
    mask: Tensor | None
    positions: Tensor
    supervised: Tensor
    labels: Tensor
    inputs: dict[str, InputMedia]
    outputs: dict[str, OutputMedia]
    shared: int = 0
    packed: tuple[int, ...] = ()
    padding: int = 0
    plain: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Every tensor on `device`."""
        return _mapped(self, lambda tensor: moved(tensor, device))

    def pin_memory(self) -> Batch:
        """Every tensor in pinned memory, which CUDA reads without the host."""
        return _mapped(self, Tensor.pin_memory)


class Lookup(Protocol):
    """Where a batch gets the frozen parts' work from: a cache, or the parts themselves."""

    def input_media(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor | None]:
        """`samples`, or `features` and `feature_mask`, of M >= 1 media."""
        ...

    def targets(self, key: str, media: Sequence[Medium]) -> dict[str, Tensor]:
        """The caption embeddings of M >= 1 media, by tensor name."""
        ...

    def latents(self, key: str, media: Sequence[Medium]) -> Tensor | None:
        """The decoder's latents of M >= 1 media; None where no denoising loss is used."""
        ...


def collate(
    items: Sequence[Rendered],
    lookup: Lookup | None,
    *,
    input_widths: Mapping[str, int],
    output_widths: Mapping[str, int],
    pad_id: int,
    pack: bool = False,
    share: bool = True,
    seeds: Sequence[int] | None = None,
    targets: bool = True,
) -> Batch:
    """Pad on the right, or pack into one row, what all conversations begin with standing there once
    (with `share`). `targets`: it is learnt from, so look up what the output media are aligned with,
    and leave out what comes behind the last state that is needed.

    `input_widths` and `output_widths` name every key of the model with its N or K: a key that no
    item uses gets zero rows, so that what trains always gets a gradient. `seeds`: one number per
    item, from which the noise of its media is drawn.
    """
    lengths = [(item.learnt if targets else 0) or len(item) for item in items]
    shared = _common_opening(items, min(lengths) - 1) if share else 0
    padding = 0
    if pack:
        own = [length - shared for length in lengths]
        offsets = [0, *accumulate(own[:-1])]
        padding = -(shared + sum(own)) % ALIGNED
        own += [padding] if padding else []
        total, rows = shared + sum(own), 1
    else:
        own = []
        total, rows = max(lengths), len(items)
        offsets = [row * total for row in range(rows)]
    ids = torch.full((rows * total,), pad_id)
    positions = torch.zeros(rows * total, dtype=torch.long)
    mask = torch.zeros(rows * total, dtype=torch.bool)
    supervised: list[int] = []
    labels: list[int] = []
    for item, length, offset in zip(items, lengths, offsets, strict=True):
        begin = shared if pack and offset else 0  # the first one brings what all begin with
        places = slice(offset + begin, offset + length)
        ids[places] = torch.tensor(item.ids[begin:length])
        positions[places] = torch.arange(begin, length)
        mask[places] = True
        for index, label in enumerate(item.labels):
            if label != UNSUPERVISED:  # the state before a token predicts it
                place = index - 1
                supervised.append(place if pack and place < shared else offset + place)
                labels.append(label)
    if padding:
        positions[-padding:] = torch.arange(shared, shared + padding)

    inputs = {key: _input_media(items, offsets, key, lookup) for key in input_widths}
    outputs = {
        key: _output_media(items, offsets, key, width, lookup if targets else None, seeds)
        for key, width in output_widths.items()
    }
    return Batch(
        ids=ids.view(rows, total),
        mask=None if pack else mask.view(rows, total),
        positions=positions.view(rows, total),
        supervised=torch.tensor(supervised, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        inputs=inputs,
        outputs=outputs,
        shared=shared,
        packed=tuple(own),
        padding=padding,
    )


def _common_opening(items: Sequence[Rendered], limit: int) -> int:
    """How many of so many first positions are equal in all rows, and no medium's."""
    first = items[0]
    for item in items:
        limit = min([limit, *(place.start for place in [*item.inputs, *item.outputs])])
        limit = num_shared(item.ids[:limit], first.ids)
    return limit if len(items) > 1 else 0


def _input_media(
    items: Sequence[Rendered], offsets: Sequence[int], key: str, lookup: Lookup | None
) -> InputMedia:
    media: list[Medium] = []
    places: list[int] = []
    for item, offset in zip(items, offsets, strict=True):
        for place in item.inputs:
            if place.key == key:
                media.append(place.medium)
                places.extend(range(offset + place.start, offset + place.start + place.length))
    found = lookup.input_media(key, media) if media and lookup is not None else {}
    return InputMedia(places=torch.tensor(places, dtype=torch.long), **found)


def _output_media(
    items: Sequence[Rendered],
    offsets: Sequence[int],
    key: str,
    width: int,
    lookup: Lookup | None,
    seeds: Sequence[int] | None,
) -> OutputMedia:
    media: list[Medium] = []
    places: list[range] = []
    names: list[int] = []
    for index, (item, offset) in enumerate(zip(items, offsets, strict=True)):
        for number, place in enumerate(item.outputs):
            if place.key == key:
                media.append(place.medium)
                places.append(range(offset + place.start, offset + place.start + place.length))
                names.append((seeds[index] if seeds is not None else index) * 64 + number)
    table = torch.tensor([list(place) for place in places], dtype=torch.long).view(-1, width)
    if not media or lookup is None:
        return OutputMedia(places=table)
    return OutputMedia(
        places=table,
        targets=lookup.targets(key, media),
        latents=lookup.latents(key, media),
        seeds=tuple(names),
    )


def _mapped(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, move) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(
            **{entry.name: _mapped(getattr(value, entry.name), move) for entry in fields(value)}
        )
    return value
