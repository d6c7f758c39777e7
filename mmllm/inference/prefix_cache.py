"""Prefix cache: key-value caches of former conversations and of the prefix that all share."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.conversation import Medium
from mmllm.data.rendering import Rendered, common_prefix_length
from mmllm.features.cache import medium_identity
from mmllm.kernels.devices import to_device
from mmllm.kernels.prepacked_linear import tensor_versions
from mmllm.model import AnyToAny


@dataclass(frozen=True)
class CachedPrefix:
    """One conversation: what was fed, by position; its key-value cache; the version of the LLM that
    computed it (`LanguageModel.version`)."""

    keys: list[Hashable]
    cache: Any
    version: Hashable


class PrefixCache:
    """Key-value caches of the last conversations, so that a later turn, another try or an edited
    one computes only what is new, media included; and of the shared prefix of all conversations
    (the beginning of the chat template and the system prompt). Threads may share one.

    A cache serves the version of the model that computed it: of its LLM, and at the positions of a
    medium of the encoder and input projection that read it (`cache_keys`). While a forward hook is
    registered on the model nothing is inserted or matched, so that the hook is called for every
    position.

    A cache takes as much memory as its conversation's positions; one whose conversation another
    one continues is dropped. Caches of models with sliding windows or recurrent states cannot be
    cropped and are not kept.
    """

    def __init__(self, max_entries: int = 4):
        self.max_entries = max_entries
        self._entries: list[CachedPrefix] = []  # newest last
        self._lock = threading.Lock()
        self._shared: tuple[Hashable, Any] | None = None  # the version of the LLM, the cache

    @property
    def entries(self) -> tuple[CachedPrefix, ...]:
        """The conversations that are kept, newest last."""
        return tuple(self._entries)

    @torch.inference_mode()
    def shared_prefix(self, model: AnyToAny, length: int) -> Any:
        """Return a key-value cache of the first positions of `model.renderer.prefix_ids`.

        The whole prefix is prefilled by itself, once for each version of the model, so that the
        bytes do not depend on who asks first. Called by one thread at a time.

        Args:
            model: the model.
            length: how many positions.
        """
        version = model.llm.version
        if self._shared is None or self._shared[0] != version:
            ids = to_device(torch.tensor([model.renderer.prefix_ids]), model.device)
            positions = torch.arange(ids.shape[1], device=model.device)[None]
            cache = model.llm.new_cache()
            model.llm(model.llm.embed(ids), positions=positions, cache=cache)
            self._shared = version, cache
        return self._shared[1].prefix(length)

    def longest_match(self, model: AnyToAny, keys: Sequence[Hashable]) -> tuple[int, Any]:
        """Find the kept conversation that shares the longest prefix with a prompt.

        Args:
            model: the model; conversations of another version of its weights do not match.
            keys: what identifies each position of the prompt: a token id, or the hash of a medium.

        Returns:
            The number of shared positions, which leaves at least one to be computed, and a cache of
            just these; 0 and None without a match.
        """
        with self._lock:
            entries = self._entries
        version = model.llm.version if entries else None
        best_length, best_cache = 0, None
        for entry in entries:
            length = _match_length(entry.keys, keys)
            if length > best_length and entry.version == version:
                best_length, best_cache = length, entry.cache
        return best_length, None if best_cache is None else best_cache.prefix(best_length)

    def insert(self, model: AnyToAny, keys: list[Hashable], cache: Any) -> None:
        """Keep a conversation's cache for its next turn; the oldest one may be dropped.

        Args:
            model: the model that computed it.
            keys: what identifies each position.
            cache: the key-value cache, which must not be extended from now on.
        """
        if cache.was_hooked or not self.max_entries:
            return
        with self._lock:
            others = [entry for entry in self._entries if entry.keys != keys[: len(entry.keys)]]
            entry = CachedPrefix(keys, cache, model.llm.version)
            self._entries = [*others, entry][-self.max_entries :]

    def clear(self) -> None:
        """Drop all conversations."""
        with self._lock:
            self._entries = []


def cache_keys(prompt: Rendered, readers: Mapping[str, Hashable] | None = None) -> list[Hashable]:
    """What stands at each position of a prompt: a token id, or (medium, offset) for a placeholder,
    where media have equal names if they are equal and read by the same weights.

    Args:
        prompt: the prompt.
        readers: key of an encoder -> the version of what reads its media (`reader_versions`).
    """
    keys: list[Hashable] = list(prompt.ids)
    for place in prompt.inputs:
        name = (place.key, (readers or {}).get(place.key), _media_key(place.medium))
        for offset in range(place.length):
            keys[place.start + offset] = (name, offset)
    return keys


def reader_versions(model: AnyToAny, prompt: Rendered) -> dict[str, Hashable]:
    """Key of each encoder that reads media of a prompt -> a hash that changes when one of its
    weights, or of its input projection's, is modified in place or replaced. Weights that would be
    read on first use are read.

    Args:
        model: the model.
        prompt: the prompt.
    """
    versions: dict[str, Hashable] = {}
    for key in {place.key for place in prompt.inputs}:
        encoder: Any = model.encoders[key]
        encoder.load()
        readers = (encoder, model.input_projections[key])
        versions[key] = hash(tuple(tensor_versions(_tensors_of(reader)) for reader in readers))
    return versions


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module and those inside it."""
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                yield tensor


def _media_key(medium: Medium) -> Hashable:
    """A name of a medium's content; a file that was written to again has another one."""
    if medium.array is not None:
        rates = getattr(medium, "sample_rate", None), getattr(medium, "fps", None)
        soundtrack = getattr(medium, "audio", None)
        content = medium_identity(replace(medium, source=None))
        return content, medium.array.shape, rates, soundtrack and _media_key(soundtrack)
    if not isinstance(medium.source, str | Path):
        return medium_identity(medium)
    try:
        stat = Path(medium.source).expanduser().stat()
    except OSError:
        return object()  # matches nothing: reading the file will raise the right error
    return str(medium.source), stat.st_mtime_ns, stat.st_size


def _match_length(cached: Sequence[Hashable], keys: Sequence[Hashable]) -> int:
    """Length of the common prefix, without a part of a medium and without the last position."""
    length = common_prefix_length(cached, keys[:-1])
    while isinstance(keys[length], tuple) and keys[length][1] > 0:  # pyright: ignore
        length -= 1
    return length
