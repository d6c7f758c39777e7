"""Runs a model over conversations and keeps states of its sites, in the feature cache's format.

There is one namespace "states-<fingerprint>" for each model and site, with an entry for each
conversation: `mmllm cache info|verify|prune` know them, and a second call computes only what is
missing. Positions of media and signals are kept whole, those of text in part.

Legend: N positions, T positions of a conversation, D width.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmllm.data.batch import collate
from mmllm.data.protocol import FeatureProvider
from mmllm.data.rendering import Rendered
from mmllm.features.cache import FeatureCache, entry_name
from mmllm.features.namespace import FeatureTensors, Namespace
from mmllm.features.store import FeatureStore
from mmllm.insight.activations import KINDS, NONE, Activations, norm_limit
from mmllm.insight.concepts import ConceptVocabulary
from mmllm.insight.sites import Site, find_site
from mmllm.model import AnyToAny
from mmllm.utils.hashing import fingerprint, sha256
from mmllm.utils.progress import progress_bar

STATES = "states"
"""Kind of the namespaces."""
_MAX_POSITIONS = 4096
"""Positions of one forward pass."""


def collect(
    model: AnyToAny,
    conversations: Sequence[Rendered],
    sites: Sequence[str],
    *,
    model_fingerprint: str,
    folder: Path | None = None,
    text_share: float = 0.5,
    vocabulary: ConceptVocabulary | None = None,
    progress: bool = True,
) -> dict[str, Activations]:
    """Run a model over conversations and keep the states of some sites.

    What lies behind the last site is not computed.

    Args:
        model: the model, in evaluation mode.
        conversations: rendered by its renderer.
        sites: names of sites of its LLM that have a state for each position.
        model_fingerprint: that of the model as it is now (`Chat.fingerprint`).
        folder: a feature cache that is read and filled; None keeps everything in memory.
        text_share: share of the text positions that is kept, drawn by the content. The beginning
            that all conversations share is never kept.
        vocabulary: names the concepts of media and words.
        progress: whether to show a progress bar.

    Returns:
        Site -> its states, at the same positions for all sites.

    Raises:
        ConfigError: a site does not exist.
        MediaError: a medium cannot be read.
        CacheError: the folder cannot be written.
    """
    for site in sites:
        find_site(model, site)
    store = FeatureStore(folder) if folder else None
    features = FeatureCache(model, store=store)
    namespaces = {
        site: _namespace(store, site, [model_fingerprint, site, text_share]) for site in sites
    }
    keys = [_content_key(conversation, store) for conversation in conversations]
    missing = [
        index
        for index, key in enumerate(keys)
        if any(key not in namespace for namespace in namespaces.values())
    ]
    missing.sort(key=lambda index: len(conversations[index]))
    prefix_len = len(model.renderer.prefix_ids)
    with progress_bar("states", total=len(missing), unit="conversation", show=progress) as bar:
        for group in groups_of(missing, [len(each) for each in conversations]):
            states = states_of(model, [conversations[index] for index in group], features, sites)
            for place, index in enumerate(group):
                kept = _kept_positions(conversations[index], keys[index], prefix_len, text_share)
                for site, namespace in namespaces.items():
                    namespace[keys[index]] = {
                        "positions": torch.from_numpy(kept.astype(np.int32)),
                        "states": states[site][place][kept].bfloat16(),
                    }
            bar.update(len(group))
    if store:
        store.flush()
    labels = [label_positions(model, conversation, vocabulary) for conversation in conversations]
    return {
        site: _table(site, model_fingerprint, conversations, keys, namespace, labels, vocabulary)
        for site, namespace in namespaces.items()
    }


@torch.inference_mode()
def states_of(
    model: AnyToAny,
    conversations: Sequence[Rendered],
    features: FeatureProvider,
    sites: Sequence[str],
) -> dict[str, list[Tensor]]:
    """States of some sites at all positions of conversations, in one forward pass.

    Args:
        model: the model.
        conversations: rendered by its renderer.
        features: gives the encoders' outputs.
        sites: names of sites of its LLM.

    Returns:
        Site -> float[T, D] for each conversation.
    """
    # Packs and plain batches are computed in one call of the layers; shared prefixes are not.
    pack = model.llm.supports_prefix_packing and model.llm.kernels == "auto"
    batch = collate(
        conversations, features, model.batch_layout, pack=pack, share=pack, targets=False
    ).to(model.device)
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for site in (find_site(model, name) for name in sites):
            hooks.enter_context(_reading(site, seen, len(sites)))
        with suppress(_AllSeen):
            model.hidden(batch)
    width = batch.ids.shape[1]
    flat = {site: states.flatten(0, 1) for site, states in seen.items()}
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    start = batch.prefix_len
    for row, conversation in enumerate(conversations):
        num_own = len(conversation) - batch.prefix_len
        for site, states in flat.items():
            prefix = states[: batch.prefix_len]
            own = states[start : start + num_own]
            found[site].append(torch.cat([prefix, own]) if pack else own)
        start = start + num_own if pack else (row + 1) * width
    return found


class _AllSeen(Exception):
    """Ends a forward pass whose last site has been seen."""


@contextmanager
def _reading(site: Site, seen: dict[str, Tensor], count: int) -> Iterator[None]:
    """Keep the states of a site in `seen`; end the pass when there are `count`."""

    def keep(value: Any) -> None:
        seen[site.name] = site.read(value).detach()
        if len(seen) == count:
            raise _AllSeen

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        keep((args, kwargs))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        keep(output)

    if site.is_input:
        handle = site.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = site.module.register_forward_hook(after)
    with handle:
        yield


def _namespace(
    store: FeatureStore | None, site: str, about: Any
) -> MutableMapping[str, FeatureTensors] | Namespace:
    return store.namespace(STATES, site, fingerprint(about)) if store else {}


def _content_key(conversation: Rendered, store: FeatureStore | None) -> str:
    """A hash of the ids and the content of the media that are read. Raises MediaError."""
    media = [(span.key, span.start, entry_name(span.medium, store)) for span in conversation.inputs]
    return sha256(repr((conversation.ids, media)))


def groups_of(indices: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut a list into groups of conversations that fit into one forward pass.

    Args:
        indices: of conversations.
        lengths: tokens of each conversation.
    """
    group: list[int] = []
    total = 0
    for index in indices:
        if group and total + lengths[index] > _MAX_POSITIONS:
            yield group
            group, total = [], 0
        group.append(index)
        total += lengths[index]
    if group:
        yield group


def _kept_positions(
    conversation: Rendered, key: str, prefix_len: int, text_share: float
) -> np.ndarray:
    """Positions whose states are kept: int[N]."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    kept = rng.random(len(conversation)) < text_share
    kept[: min(prefix_len, len(conversation))] = False
    for span in (*conversation.inputs, *conversation.outputs):
        kept[span.start : span.start + span.length] = True
    return np.flatnonzero(kept)


def label_positions(
    model: AnyToAny, conversation: Rendered, vocabulary: ConceptVocabulary | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Say what each position of a conversation is: see `Activations`.

    Args:
        model: the model that it was rendered for.
        conversation: the conversation.
        vocabulary: names the concepts of media and words.

    Returns:
        kinds uint8[T], media int16[T], concepts int16[T].
    """
    size = len(conversation)
    kinds = np.full(size, KINDS.index("text"), dtype=np.uint8)
    media = np.full(size, NONE, dtype=np.int16)
    concepts = np.full(size, NONE, dtype=np.int16)
    number = (
        {concept: index for index, concept in enumerate(vocabulary.concepts)} if vocabulary else {}
    )
    if vocabulary:
        pieces = [piece_of(model, token) for token in conversation.ids]
        ends = np.cumsum([len(piece) for piece in pieces])
        for start, end, concept in vocabulary.in_text("".join(pieces)):
            first, last = np.searchsorted(ends, [start, end - 1], side="right")
            concepts[first : last + 1] = number[concept]
    for index, span in enumerate((*conversation.inputs, *conversation.outputs)):
        where = slice(span.start, span.start + span.length)
        is_input = index < len(conversation.inputs)
        kind = span.medium.modality if is_input else "signal"
        kinds[where], media[where] = KINDS.index(kind), index
        concept = vocabulary.of_medium(span.medium) if vocabulary else None
        concepts[where] = NONE if concept is None else number[concept]
    return kinds, media, concepts


def piece_of(model: AnyToAny, token: int) -> str:
    """The text of one token; empty for placeholders and signal tokens.

    Args:
        model: whose tokenizer is used.
        token: its id.
    """
    if token >= model.llm.tokens.vocab_size:
        return ""
    return _decode(model.llm.tokenizer, token)


@functools.lru_cache(maxsize=100_000)
def _decode(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token])


def _table(
    site: str,
    model_fingerprint: str,
    conversations: Sequence[Rendered],
    keys: Sequence[str],
    namespace: MutableMapping[str, FeatureTensors] | Namespace,
    labels: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    vocabulary: ConceptVocabulary | None,
) -> Activations:
    entries = [namespace[key] for key in keys]
    places = [entry["positions"].numpy() for entry in entries]
    columns = [
        np.concatenate([column[at] for column, at in zip(values, places, strict=True)])
        for values in zip(*labels, strict=True)
    ]
    tokens = [np.array(each.ids)[at] for each, at in zip(conversations, places, strict=True)]
    kinds, media, concepts = map(torch.from_numpy, columns)
    states = torch.cat([entry["states"] for entry in entries])
    return Activations(
        site=site,
        model=model_fingerprint,
        states=states,
        kinds=kinds,
        tokens=torch.from_numpy(np.concatenate(tokens)).int(),
        items=torch.arange(len(places)).repeat_interleave(torch.tensor(list(map(len, places)))),
        positions=torch.from_numpy(np.concatenate(places)),
        media=media,
        concepts=concepts,
        conversations=conversations,
        concept_names=tuple(vocabulary.concepts) if vocabulary else (),
        max_norm=norm_limit(states),
    )
