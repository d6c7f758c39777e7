"""Sequences that share one key-value cache, and what they are fed in a forward pass.

In a batch sequences take steps of different widths: one token, a signal span, or a token and its
draft. A step is as wide as the widest one, and the others are padded on the left with positions
that nothing attends to.

Legend: B sequences, T positions of the cache, W new positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.data.media_layout import position_shift
from mmllm.inference.prefill import Prefill
from mmllm.inference.sequence import SequenceState
from mmllm.inference.speculative import verify_draft
from mmllm.kernels.cached_attention import ForwardRequest
from mmllm.kernels.devices import to_device
from mmllm.model import AnyToAny
from mmllm.tokens import Sources


@dataclass
class GroupStep:
    """What a group is fed in one forward pass.

    Attributes:
        request: the embeddings of all sequences, and the cache.
        ids: the ids of each sequence, without padding; empty while prompts are prefilled.
        draft: the pieces at the end of the ids of a single sequence that are still to be verified.
    """

    request: ForwardRequest
    ids: list[list[int]]
    draft: list[list[int]]


@dataclass
class CacheGroup:
    """Sequences in one key-value cache.

    Attributes:
        sequences: B of them, in the order of the cache's rows.
        mask: bool[B, T] on the CPU: positions that are no padding.
        cache: the cache.
        prompts: the prompts, until they are prefilled. One that all sequences share is a single
            row, and so are the mask and the cache until then.
        last: hidden states float[B, D] of the last positions, from which those sequences sample
            that have no `next_ids`.
    """

    sequences: list[SequenceState]
    mask: Tensor
    cache: Any
    prompts: ForwardRequest | None
    last: Tensor | None = None

    @classmethod
    def build(cls, model: AnyToAny, prefill: Prefill, cache: Any) -> CacheGroup:
        """Embed prompts that continue a cache; their media are encoded here.

        Args:
            model: the model.
            prefill: prompts with the same number of cached positions.
            cache: the key-value cache of those positions.
        """
        batch = prefill.batch.to(model.device)
        embeds, mask, positions = model.embed(batch), prefill.batch.mask, batch.positions
        assert mask is not None  # prompts are padded, not packed
        mask, sources = mask.clone(), prefill.batch.sources.ids
        width = embeds.shape[1]
        for sequence, prompt in zip(prefill.sequences, cycle(prefill.prompts), strict=False):
            sequence.position = len(prompt) - position_shift(prompt.inputs)
        for prompt in prefill.prompts:
            for place in prompt.inputs:
                cache.keep_whole(place.start, place.start + place.length)
        for row, prompt in enumerate(prefill.prompts):
            # From padding on the right to padding on the left: decoding appends on the right.
            shift = width - (len(prompt) - prefill.num_cached)
            for padded in (embeds, mask, positions, sources):
                padded[row] = padded[row].roll(shift, dims=0)
        mask = F.pad(mask, (prefill.num_cached, 0), value=True)
        owners = tuple(prefill.sequences[: len(prefill.prompts)])
        positions = positions + prefill.first_position
        prompts = ForwardRequest(embeds, positions, mask, cache, Sources(sources, owners))
        return cls(prefill.sequences, mask, cache, prompts)

    @property
    def can_grow(self) -> bool:
        """Whether sequences of other groups can be appended."""
        return self.cache.croppable and self.cache.reads_all

    def separated(self) -> list[CacheGroup]:
        """One group for each sequence, if the cache is one of which only parts are read; else this
        one, if it has sequences."""
        if self.cache.reads_all or len(self.sequences) < 2 or self.last is None:
            return [self] if self.sequences else []
        return [
            CacheGroup(
                [sequence],
                self.mask[row : row + 1],
                self.cache.select_row(row, self.mask[row]),
                None,
                self.last[row : row + 1],
            )
            for row, sequence in enumerate(self.sequences)
        ]

    def concat(self, other: CacheGroup) -> None:
        """Append the sequences of another group. Both have been prefilled."""
        assert self.last is not None
        assert other.last is not None
        self.cache.concat(other.cache)
        width = max(self.mask.shape[1], other.mask.shape[1])
        masks = [F.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        self.mask = torch.cat(masks)
        self.last = torch.cat([self.last, other.last])
        self.sequences = [*self.sequences, *other.sequences]

    def select(self, rows: list[int]) -> None:
        """Keep only these sequences, and drop positions that are padding for all of them. A cache
        that cannot be cropped, or that has not been prefilled, keeps all until none is left."""
        if len(rows) == len(self.sequences):
            return
        if not rows:
            self.sequences = []
            return
        if self.last is None or not self.cache.croppable:
            return
        mask = self.mask[rows]
        start = int(mask.any(0).int().argmax())
        self.cache.select_rows(rows, start)
        self.mask = mask[:, start:]
        self.last = torch.stack([self.last[row] for row in rows])
        self.sequences = [self.sequences[row] for row in rows]

    def next_step(self, model: AnyToAny) -> GroupStep:
        """The prompts, or the `next_ids` of every sequence, with a draft if it is a single one."""
        if self.prompts:
            return GroupStep(self.prompts, [[] for _ in self.sequences], [])
        is_single = len(self.sequences) == 1 and self.can_grow
        draft = self.sequences[0].propose_draft() if is_single else []
        ids = [[*sequence.next_ids, *chain(*draft)] for sequence in self.sequences]
        width = max(map(len, ids))
        inputs = torch.zeros(2, len(ids), width, dtype=torch.long)  # ids and positions
        mask = torch.zeros(len(ids), width, dtype=torch.bool)
        for row, (sequence, new) in enumerate(zip(self.sequences, ids, strict=True)):
            if count := len(new):
                inputs[0, row, -count:] = torch.tensor(new)
                inputs[1, row, -count:] = torch.arange(sequence.position, sequence.position + count)
                mask[row, -count:] = True
        self.mask = torch.cat([self.mask, mask], dim=1)
        tokens, positions = to_device(inputs, model.device)
        embeds = model.llm.embed(tokens)
        sources = Sources(inputs[0].masked_fill(~mask, -1), tuple(self.sequences))
        request = ForwardRequest(embeds, positions, self.mask, self.cache, sources)
        return GroupStep(request, ids, draft)

    def accept(self, model: AnyToAny, step: GroupStep, states: Tensor) -> None:
        """Give each sequence its hidden states, verify the draft, and crop rejected positions.

        Args:
            model: the model.
            step: what was computed: the token ids of each sequence, and the draft if there is one.
            states: float[B, W, D], the last hidden states.
        """
        self.prompts, self.last = None, states[:, -1]
        if len(self.last) < len(self.sequences):
            self._repeat(len(self.sequences))
        for row, (sequence, ids) in enumerate(zip(self.sequences, step.ids, strict=True)):
            if sequence.next_ids:
                start = states.shape[1] - len(ids)
                sequence.accept(states[row, start : start + len(sequence.next_ids)])
        if step.draft:
            rejected = verify_draft(model, self.sequences[0], step.draft, states[0])
            if rejected:
                self.mask = self.mask[:, :-rejected]
                self.cache.crop(-rejected)

    def _repeat(self, num: int) -> None:
        """Give each of `num` sequences its own row of the prompt that they share."""
        assert self.last is not None
        self.cache.batch_repeat_interleave(num)
        self.mask = self.mask.repeat_interleave(num, dim=0)
        self.last = self.last.repeat_interleave(num, dim=0)
