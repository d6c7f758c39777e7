"""Prefill: prompts that are rendered, with their media decoded, ready for the LLM.

Legend: B sequences, P prompts: B of them, or one that all sequences share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmllm.data.batch import Batch, collate
from mmllm.data.media_layout import position_shift
from mmllm.data.protocol import FeatureProvider
from mmllm.data.rendering import Rendered, common_prefix_length
from mmllm.inference.prefix_cache import PrefixCache, cache_keys, reader_versions
from mmllm.inference.sequence import SequenceState
from mmllm.kernels.forward_hooks import ForwardHooks
from mmllm.model import AnyToAny

_MIN_PREFIX_SHARE = 8
"""The shared prefix is prefilled separately if it covers at least 1/8 of the longest prompt:
attention without a past is faster, which outweighs what a shorter prefix saves."""


@dataclass(eq=False)
class Prefill:
    """B sequences that enter a batch together.

    Attributes:
        sequences: one per prompt; or all of one prompt, which is then prefilled only once.
        prompts: the P whole prompts.
        batch: the prompts without their first `num_cached` positions, padded on the right.
        num_cached: how many first positions are in a key-value cache.
        cache: that cache; None stands for the shared prefix of all conversations.
    """

    sequences: list[SequenceState]
    prompts: list[Rendered]
    batch: Batch
    num_cached: int = 0
    cache: Any = None

    @property
    def first_position(self) -> int:
        """The position of the first token that is not cached. Media are cached for one prompt only;
        several share text."""
        cached = (p for p in self.prompts[0].inputs if p.start < self.num_cached)
        return self.num_cached - position_shift(cached)


def prepare_prefill(
    model: AnyToAny,
    prompts: Sequence[Rendered],
    features: FeatureProvider,
    sequences: Sequence[SequenceState],
    prefix_cache: PrefixCache | None = None,
) -> Prefill:
    """Decode the media of B prompts and look their prefixes up; in any thread, at any time.

    Args:
        model: the model.
        prompts: rendered with `add_generation_prompt`; if all are the same, one is prefilled.
        features: gives the encoders' inputs.
        sequences: one per prompt.
        prefix_cache: where the shared prefix comes from, and, if P is 1, former conversations;
            the sequence is inserted when it is done, if B is 1, too.

    Raises:
        MediaError: for a medium that cannot be decoded.
    """
    is_hooked = model.llm.is_hooked
    for sequence, prompt in zip(sequences, prompts, strict=True):
        sequence.draft.extend(prompt.ids)
        sequence.may_draft = not is_hooked
    if model.llm.supports_cache_crop and _are_same(prompts):
        prompts = prompts[:1]
    num_cached, cache = 0, None
    if prefix_cache is not None and not is_hooked:
        num_cached = _shared_prefix_length(model, prompts)
        if prefix_cache.max_entries and len(prompts) == 1 and not _reads_hooked(model, prompts[0]):
            keys = cache_keys(prompts[0], reader_versions(model, prompts[0]))
            if len(sequences) == 1:
                sequences[0].cache_keys = keys
            length, match = prefix_cache.longest_match(model, keys)
            if length > num_cached:
                num_cached, cache = length, match
    for sequence in sequences:
        sequence.output.num_cached = num_cached
    batch = collate(
        [_without_prefix(prompt, num_cached) for prompt in prompts],
        features,
        model.batch_layout,
        targets=False,
    )
    return Prefill(list(sequences), list(prompts), batch, num_cached, cache)


def prepare_prefills(
    model: AnyToAny,
    prompts: Sequence[Rendered],
    features: FeatureProvider,
    sequences: Sequence[SequenceState],
    prefix_cache: PrefixCache | None = None,
) -> list[Prefill]:
    """Prepare prompts that enter one batch, or each by itself: with `llm.memory`, where a cache of
    which only parts are read belongs to one conversation, and with recurrent layers, whose states
    the padding of steps of different widths would change.

    Args:
        model: the model.
        prompts: as `prepare_prefill` takes them.
        features: gives the encoders' inputs.
        sequences: one per prompt.
        prefix_cache: as `prepare_prefill` takes it.

    Raises:
        MediaError: for a medium that cannot be decoded.
    """
    is_recurrent = model.llm.decoder_forward.is_recurrent
    if not is_recurrent and (model.llm.config.memory is None or _are_same(prompts)):
        return [prepare_prefill(model, prompts, features, sequences, prefix_cache)]
    return [
        prepare_prefill(model, [prompt], features, [sequence], prefix_cache)
        for prompt, sequence in zip(prompts, sequences, strict=True)
    ]


def _reads_hooked(model: AnyToAny, prompt: Rendered) -> bool:
    """Whether a hook may look into what encodes the media of a prompt, or alter it."""
    return any(
        ForwardHooks(module).may_alter_outputs
        for key in {place.key for place in prompt.inputs}
        for module in (model.encoders[key], model.input_projections[key])
    )


def _are_same(prompts: Sequence[Rendered]) -> bool:
    """Whether all prompts have the same ids and hold the very same media objects."""
    first = prompts[0]
    media = [id(place.medium) for place in first.inputs]
    return all(
        prompt.ids == first.ids and [id(place.medium) for place in prompt.inputs] == media
        for prompt in prompts[1:]
    )


def _shared_prefix_length(model: AnyToAny, prompts: Sequence[Rendered]) -> int:
    """How many first positions of all prompts are the model's shared prefix; 0 if these are too few
    to gain by it, or if its caches cannot be cropped."""
    length = min(_match(model.renderer.prefix_ids, prompt.ids) for prompt in prompts)
    is_short = length < max(map(len, prompts)) / _MIN_PREFIX_SHARE
    return 0 if is_short or not model.llm.supports_cache_crop else length


def _match(prefix: Sequence[int], ids: Sequence[int]) -> int:
    """Length of the common prefix, without the last position, which is always computed."""
    return common_prefix_length(prefix, ids[:-1])


def _without_prefix(prompt: Rendered, length: int) -> Rendered:
    """The prompt after its first `length` positions."""
    return Rendered(
        ids=prompt.ids[length:],
        labels=prompt.labels[length:],
        inputs=[
            replace(place, start=place.start - length)
            for place in prompt.inputs
            if place.start >= length
        ],
    )
