"""Continuous batching: sequences join a running batch, and leave it as soon as they are done.

Every sequence samples from its own generator, so that a batch gives what single calls give. A
sequence that is alone is fed draft tokens besides (mmllm.inference.speculative). A prompt is
prefilled behind what the prefix cache holds of it.

Legend: B sequences, V text vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.data.protocol import FeatureProvider
from mmllm.data.rendering import Rendered
from mmllm.inference.cache_group import CacheGroup
from mmllm.inference.outputs import GenerationOutput
from mmllm.inference.prefill import Prefill, prepare_prefills
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.sampling import Sampling
from mmllm.inference.sequence import SequenceState
from mmllm.model import AnyToAny

MAX_MIXED_PREFILL = 64
"""Most positions of prompts that are prefilled in the same forward pass as the next tokens of other
sequences. Longer prompts gain nothing by it, and an error in them is not to reach the others."""


_DEFAULTS = Sampling()


class ContinuousBatcher:
    """Sequences that are generated together: each `step` feeds every one a token or a signal span.
    Sequences join between steps, and leave when they are done. Used by one thread at a time.

    Caches of models with sliding windows or recurrent states cannot be joined: sequences that join
    later take steps of their own, and those of one prefill leave together. With `llm.memory` every
    sequence has a cache of its own; the weights are still read once for all.
    """

    def __init__(self, model: AnyToAny, prefix_cache: PrefixCache | None = None):
        self.model = model
        self.prefix_cache = prefix_cache
        self._groups: list[CacheGroup] = []

    @property
    def sequences(self) -> list[SequenceState]:
        """The sequences that are not done."""
        return [
            sequence for group in self._groups for sequence in group.sequences if not sequence.done
        ]

    @torch.inference_mode()
    def join(self, prefill: Prefill) -> None:
        """Add sequences: their media are encoded now; their prompts are prefilled by the next step,
        in one forward pass with the next tokens of the others, or, if they are long, now."""
        group = CacheGroup.build(self.model, prefill, self._cache_of(prefill))
        if prefill.batch.ids.numel() > MAX_MIXED_PREFILL:
            self._forward([group])
        self._groups.append(group)

    @torch.inference_mode()
    def step(self) -> None:
        """Sample for every sequence, and feed what was sampled in one forward pass."""
        self.remove_done()
        for group in self._groups:
            if group.last is not None:
                self._sample(group, group.last)
        self._groups = [part for group in self._groups for part in group.separated()]
        if self._groups:
            self._forward(self._groups)
        self.remove_done()
        if self._groups and self._groups[0].can_grow:
            first, *others = self._groups
            for group in others:
                first.concat(group)
            self._groups = [first]

    def remove_done(self) -> None:
        """Let sequences leave that are done."""
        for group in self._groups:
            group.select([row for row, sequence in enumerate(group.sequences) if not sequence.done])
        self._groups = [group for group in self._groups if group.sequences]

    def clear(self) -> None:
        """Remove all sequences."""
        self._groups = []

    def _cache_of(self, prefill: Prefill) -> Any:
        """A cache that holds the first `num_cached` positions of the prompts."""
        if prefill.cache is not None:
            return prefill.cache
        if prefill.num_cached and self.prefix_cache is not None:
            return self.prefix_cache.shared_prefix(self.model, prefill.num_cached)
        return self.model.llm.new_cache()

    def _sample(self, group: CacheGroup, last: Tensor) -> None:
        """Sample for those sequences that have no `next_ids`, from hidden states float[B, D]; those
        that end leave."""
        rows = [
            row
            for row, sequence in enumerate(group.sequences)
            if not (sequence.next_ids or sequence.done)
        ]
        if rows:
            logits = self.model.llm.head(last)  # [B, V + O]
            sampled = torch.cat([group.sequences[row].sample(logits[row]) for row in rows])
            # The host waits for the device once, whatever B is.
            for row, index in zip(rows, sampled.tolist(), strict=True):
                group.sequences[row].advance(index)
            self._insert_done(group)
        group.select([row for row, sequence in enumerate(group.sequences) if sequence.next_ids])

    def _forward(self, groups: Sequence[CacheGroup]) -> None:
        """Feed every sequence what comes next, in one forward pass."""
        steps = [group.next_step(self.model) for group in groups]
        states = self.model.llm.forward_with_cache([step.request for step in steps])
        for group, step, hidden in zip(groups, steps, states, strict=True):
            group.accept(self.model, step, hidden)
            self._insert_done(group)

    def _insert_done(self, group: CacheGroup) -> None:
        """Insert the caches of sequences that have ended into the prefix cache."""
        if self.prefix_cache is None or not group.cache.croppable:
            return
        for row, sequence in enumerate(group.sequences):
            if sequence.done and sequence.cache_keys:
                cache = group.cache.select_row(row, group.mask[row])
                self.prefix_cache.insert(self.model, sequence.cache_keys, cache)


def generate(
    model: AnyToAny,
    prompts: Sequence[Rendered],
    features: FeatureProvider,
    *,
    sampling: Sampling | Sequence[Sampling] = _DEFAULTS,
    generators: Sequence[torch.Generator] | None = None,
    prefix_cache: PrefixCache | None = None,
) -> list[GenerationOutput]:
    """Generate for B prompts in one batch.

    Args:
        model: the model.
        prompts: rendered with `add_generation_prompt`.
        features: gives the encoders' inputs.
        sampling: for all prompts, or one for each.
        generators: one for each prompt; seeded with 0 unless given.
        prefix_cache: used and, if B is 1, added to.

    Returns:
        One output for each prompt.
    """
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if generators is None:
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
    sequences = [
        SequenceState(model, setting, generator)
        for setting, generator in zip(settings, generators, strict=True)
    ]
    batcher = ContinuousBatcher(model, prefix_cache)
    for prefill in prepare_prefills(model, prompts, features, sequences, prefix_cache):
        batcher.join(prefill)
    while batcher.sequences:
        batcher.step()
    return [sequence.output for sequence in sequences]
