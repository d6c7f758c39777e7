"""Batches: rendered conversations collated into tensors.

Legend: B rows, T positions, M media of one key in the batch (may be 0), N placeholders per medium,
K signal tokens per medium, P supervised positions, S samples shape, L feature tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from mmllm.conversation import Medium
from mmllm.data.media_layout import position_ids
from mmllm.data.protocol import FeatureProvider
from mmllm.data.rendering import UNSUPERVISED, Rendered, common_prefix_length
from mmllm.kernels.devices import to_device
from mmllm.tokens import Sources

PACK_MULTIPLE = 16
"""The length of a pack is a multiple of this: bfloat16 matrix products on CPUs are slower for other
heights, and oneDNN compiles a kernel for each new height."""

_SEEDS_PER_ITEM = 64
"""Noise seeds reserved for the media of one item."""


@dataclass
class InputMedia:
    """The input media of one encoder in a batch.

    Attributes:
        token_indices: int[M * N], positions of their tokens in the flattened B * T positions; with
            `lengths` as many as these say.
        samples: float[M, *S], preprocessed media, or None if `features` are given.
        features: float[M, L, C], encoder outputs, or None if `samples` are given.
        feature_mask: bool[M, L], which feature tokens are real, or None if all are.
        lengths: int[M], tokens of each medium, or None if all have N.
    """

    token_indices: Tensor
    samples: Tensor | None = None
    features: Tensor | None = None
    feature_mask: Tensor | None = None
    lengths: Tensor | None = None

    def select_tokens(self, projected: Tensor, key: str) -> Tensor:
        """Select the tokens that have a position.

        Args:
            projected: float[M, N, D].
            key: the encoder's key, for messages.

        Returns:
            float[positions, D].

        Raises:
            ValueError: there are more or fewer than positions.
        """
        placed = projected.flatten(0, 1)
        if self.lengths is not None:
            columns = torch.arange(projected.shape[1], device=projected.device)
            placed = projected[columns < self.lengths[:, None]]
        if len(placed) != len(self.token_indices):
            raise ValueError(
                f"{key}: {len(self.token_indices)} placeholder positions but {len(placed)} "
                "projected tokens; was the batch rendered for this model?"
            )
        return placed


@dataclass
class OutputMedia:
    """The output media of one decoder in a batch.

    Attributes:
        token_indices: int[M, K], positions of their signal tokens in the flattened B * T positions.
        word_indices: int[M, W], likewise of the last W text tokens of the reply in front of each
            medium, -1 where there are fewer; None for output projections that read none.
        targets: caption embeddings that the projected signal states are aligned with, by tensor
            name.
        latents: float[M, …], targets of the denoising loss, or None without that loss.
        seeds: M integers on the host, one per medium, that seed its noise.
        reference_latents: float[R, …], of the references of all media, one after the other; None if
            there are none.
        num_references: M integers on the host, how many of these each medium has.
    """

    token_indices: Tensor
    word_indices: Tensor | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    seeds: tuple[int, ...] = ()
    reference_latents: Tensor | None = None
    num_references: tuple[int, ...] = ()

    @property
    def references(self) -> list[Tensor] | None:
        """Of each medium the latents of its references; None if no medium has any."""
        if self.reference_latents is None:
            return None
        return list(self.reference_latents.split(list(self.num_references)))

    def select_states(self, hidden: Tensor) -> Tensor:
        """Select the states that the output projection reads: float[B * T, D] -> float[M, W + K,
        D], with zeros where a reply has fewer than W words."""
        states = hidden[self.token_indices]
        if self.word_indices is None:
            return states
        words = hidden[self.word_indices.clamp_min(0)]
        is_present = (self.word_indices >= 0)[..., None]
        return torch.cat([words.where(is_present, words.new_zeros(())), states], dim=1)


@dataclass
class Batch:
    """The tensors of one forward pass, padded on the right or packed into one row.

    Attributes:
        ids: int[B, T], token ids.
        mask: bool[B, T], which positions are real, or None when packed.
        positions: int[B, T], position ids; int[B, T, 3] where media have a grid (M-RoPE).
        target_indices: int[P], flat positions whose hidden states predict `labels`.
        labels: int[P], rows of the output head (`mmllm.tokens`).
        first_tokens: int[F], places among `labels` of what begins a reply or follows a medium.
        inputs: media by encoder key; every key of the model is present.
        outputs: media by decoder key; every key of the model is present.
        prefix_len: length of the text prefix that all conversations share. A pack holds it once, at
            its beginning.
        seq_lens: lengths of the packed conversations without the shared prefix; empty if not
            packed.
        padding: length of the last entry of `seq_lens` if it is padding, else 0.
        text_windows: int[W, S], windows of plain text for the loss `kl`, or None.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor
    target_indices: Tensor
    labels: Tensor
    first_tokens: Tensor
    inputs: dict[str, InputMedia]
    outputs: dict[str, OutputMedia]
    prefix_len: int = 0
    seq_lens: tuple[int, ...] = ()
    padding: int = 0
    text_windows: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to `device`."""
        return _map_tensors(self, lambda tensor: to_device(tensor, device))

    @property
    def sources(self) -> Sources:
        """What stands at each position."""
        flat = self.ids.flatten().clone()
        for number, media in enumerate(self.inputs.values()):
            flat[media.token_indices] += number
        if self.padding:
            flat[-self.padding :] = -1
        ids = flat.view_as(self.ids)
        return Sources(ids if self.mask is None else ids.masked_fill(~self.mask, -1))

    def pin_memory(self) -> Batch:
        """Copy every tensor to page-locked memory, from which CUDA copies asynchronously."""
        return _map_tensors(self, Tensor.pin_memory)


@dataclass(frozen=True)
class BatchLayout:
    """The facts about a model that decide how conversations are laid out in a batch.

    Attributes:
        num_input_tokens: N by encoder key. A key that no conversation uses gets M = 0 rows, so that
            every trainable projection receives a gradient.
        num_signal_tokens: K by decoder key, likewise.
        pad_id: token id of padding.
        supports_prefix_packing: whether packed conversations can share a prefix.
        num_words: W by decoder key, for decoders whose output projection reads words of the reply.
    """

    num_input_tokens: Mapping[str, int]
    num_signal_tokens: Mapping[str, int]
    pad_id: int = 0
    supports_prefix_packing: bool = False
    num_words: Mapping[str, int] = field(default_factory=dict)


def collate(
    items: Sequence[Rendered],
    provider: FeatureProvider | None,
    layout: BatchLayout,
    *,
    pack: bool = False,
    share: bool = True,
    seeds: Sequence[int] | None = None,
    targets: bool = True,
) -> Batch:
    """Collate rendered conversations into a batch, padded on the right or packed into one row.

    Args:
        items: at least one rendered conversation.
        provider: source of input media, alignment targets and latents; None: positions only.
        layout: that of the model.
        pack: whether to put all conversations into one row, with their shared prefix once.
        share: whether to look for a shared prefix.
        seeds: one integer per item that seeds the noise of its media; None: the item's index.
        targets: whether the batch is for training: targets are looked up, and positions after the
            last supervised state are left out.

    Returns:
        The batch, on the CPU.

    Raises:
        MediaError: a medium cannot be read.
        CacheError: a complete feature cache lacks an entry.
    """
    lengths = [(item.num_used_tokens if targets else 0) or len(item) for item in items]
    prefix_len = _shared_prefix_length(items, min(lengths) - 1) if share else 0
    padding = 0
    if pack:
        seq_lens = [length - prefix_len for length in lengths]
        offsets = [0, *accumulate(seq_lens[:-1])]
        padding = -(prefix_len + sum(seq_lens)) % PACK_MULTIPLE
        seq_lens += [padding] if padding else []
        total, rows = prefix_len + sum(seq_lens), 1
    else:
        seq_lens = []
        total, rows = max(lengths), len(items)
        offsets = [row * total for row in range(rows)]
    ids = torch.full((rows * total,), layout.pad_id)
    own_positions = [
        position_ids(item.inputs, length) for item, length in zip(items, lengths, strict=True)
    ]
    axes = (3,) if any(own.ndim == 2 for own in own_positions) else ()
    positions = torch.zeros(rows * total, *axes, dtype=torch.long)
    mask = torch.zeros(rows * total, dtype=torch.bool)
    target_indices: list[int] = []
    labels: list[int] = []
    first_tokens: list[int] = []
    for item, length, offset, own in zip(items, lengths, offsets, own_positions, strict=True):
        begin = prefix_len if pack and offset else 0  # the first conversation holds the prefix
        where = slice(offset + begin, offset + length)
        ids[where] = torch.tensor(item.ids[begin:length])
        positions[where] = own[begin:] if own.ndim > len(axes) else own[begin:, None]
        mask[where] = True
        after_media = {span.start + span.length for span in item.outputs}
        for index, label in enumerate(item.labels):
            if label != UNSUPERVISED:  # the state before a token predicts it
                state = index - 1
                if item.labels[state] == UNSUPERVISED or index in after_media:
                    first_tokens.append(len(labels))
                target_indices.append(state if pack and state < prefix_len else offset + state)
                labels.append(label)
    if padding:
        own = torch.arange(prefix_len, prefix_len + padding)
        positions[-padding:] = own[:, None] if axes else own

    inputs = {
        key: _input_media(items, offsets, key, num, provider)
        for key, num in layout.num_input_tokens.items()
    }
    outputs = {
        key: _output_media(items, offsets, key, width, provider if targets else None, seeds)
        for key, width in layout.num_signal_tokens.items()
    }
    for key, num in layout.num_words.items():
        outputs[key].word_indices = _word_indices(
            items, offsets, key, num, shared=prefix_len if pack else 0
        )
    return Batch(
        ids=ids.view(rows, total),
        mask=None if pack else mask.view(rows, total),
        positions=positions.view(rows, total, *axes),
        target_indices=torch.tensor(target_indices, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        first_tokens=torch.tensor(first_tokens, dtype=torch.long),
        inputs=inputs,
        outputs=outputs,
        prefix_len=prefix_len,
        seq_lens=tuple(seq_lens),
        padding=padding,
    )


def _shared_prefix_length(items: Sequence[Rendered], limit: int) -> int:
    """Return the length, at most `limit`, of the text prefix that all items share; 0 for a single
    item. Positions of media are never shared."""
    first = items[0]
    for item in items:
        limit = min([limit, *(span.start for span in [*item.inputs, *item.outputs])])
        limit = common_prefix_length(item.ids[:limit], first.ids)
    return limit if len(items) > 1 else 0


def _input_media(
    items: Sequence[Rendered],
    offsets: Sequence[int],
    key: str,
    num_tokens: int,
    provider: FeatureProvider | None,
) -> InputMedia:
    """Collect the input media of encoder `key`, which have at most `num_tokens` tokens each;
    `offsets` are the first positions of the items."""
    media: list[Medium] = []
    indices: list[int] = []
    lengths: list[int] = []
    for item, offset in zip(items, offsets, strict=True):
        for span in item.inputs:
            if span.key == key:
                media.append(span.medium)
                indices.extend(range(offset + span.start, offset + span.start + span.length))
                lengths.append(span.length)
    tensors = provider.input_media(key, media) if media and provider is not None else {}
    own_lengths = torch.tensor(lengths) if any(length != num_tokens for length in lengths) else None
    return InputMedia(
        token_indices=torch.tensor(indices, dtype=torch.long), lengths=own_lengths, **tensors
    )


def _output_media(
    items: Sequence[Rendered],
    offsets: Sequence[int],
    key: str,
    width: int,
    provider: FeatureProvider | None,
    seeds: Sequence[int] | None,
) -> OutputMedia:
    """Collect the output media of decoder `key`, which have `width` signal tokens each."""
    media: list[Medium] = []
    ranges: list[range] = []
    noise_seeds: list[int] = []
    references: list[tuple[Medium, ...]] = []
    for index, (item, offset) in enumerate(zip(items, offsets, strict=True)):
        for number, span in enumerate(item.outputs):
            if span.key == key:
                media.append(span.medium)
                references.append(span.references)
                ranges.append(range(offset + span.start, offset + span.start + span.length))
                seed = seeds[index] if seeds is not None else index
                noise_seeds.append(seed * _SEEDS_PER_ITEM + number)
    indices = torch.tensor([list(own) for own in ranges], dtype=torch.long).view(-1, width)
    if not media or provider is None:
        return OutputMedia(token_indices=indices)
    given = [medium for each in references for medium in each]
    return OutputMedia(
        token_indices=indices,
        targets=provider.targets(key, media),
        latents=provider.latents(key, media),
        seeds=tuple(noise_seeds),
        reference_latents=provider.latents(key, given) if given else None,
        num_references=tuple(map(len, references)),
    )


def _word_indices(
    items: Sequence[Rendered], offsets: Sequence[int], key: str, num: int, *, shared: int
) -> Tensor:
    """Return the flat positions of the last `num` text tokens in front of each medium of decoder
    `key`: int[M, num], -1 where its reply has fewer. The first `shared` positions of all items are
    those of the first."""
    rows: list[list[int]] = []
    for item, offset in zip(items, offsets, strict=True):
        for span in item.outputs:
            if span.key != key:
                continue
            words = list(islice(_reply_before(item, span.start), num))[::-1]
            flat = [index if index < shared else offset + index for index in words]
            rows.append([-1] * (num - len(flat)) + flat)
    return torch.tensor(rows, dtype=torch.long).view(-1, num)


def _reply_before(item: Rendered, end: int) -> Iterator[int]:
    """Yield the positions of a reply's text tokens that lie directly in front of a medium, the last
    one first."""
    first = max((span.start + span.length for span in item.outputs if span.start < end), default=0)
    for index in range(end - 1, first - 1, -1):
        if item.labels[index] != item.ids[index]:  # no longer the reply
            return
        yield index


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor in nested dataclasses and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(entry, function) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(
            **{
                entry.name: _map_tensors(getattr(value, entry.name), function)
                for entry in fields(value)
            }
        )
    return value
