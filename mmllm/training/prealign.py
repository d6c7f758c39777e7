"""Pre-alignment: projections are trained alone, before any gradient goes through the LLM.

Input side: this needs only a frozen encoder's features and the frozen LLM's token embeddings, so a
few hundred steps take seconds, where one step through the LLM takes a second. Each projected token
is pulled towards the embedding of the reply about its medium and pushed away from those of the
other replies in the batch (InfoNCE, van den Oord et al. 2018; against text as in CLIP, Radford et
al. 2021). The LLM then reads something close to the word itself, which it can already repeat. A
projection with a vocabulary of its own (WordsProjection) gets one word for each reply, initialised
with the LLM's embeddings of that reply, and learns to classify; one that spells (CTCProjection)
learns the replies token by token.

Output side: the LLM runs once over each conversation, and the output projections learn to map the
cached hidden states of its signal tokens to the decoders' conditions. At the end of a stage that
has changed the LLM, realignment does so again.

Legend: M media of a batch, N tokens of a medium, K signal tokens, R replies, D width of the LLM.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.config import PrealignConfig, StageConfig
from mmllm.conversation import Medium
from mmllm.data.rendering import Rendered
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache, medium_identity
from mmllm.kernels.devices import to_device
from mmllm.losses import alignment_distance
from mmllm.model import AnyToAny
from mmllm.projections.ctc import CTCProjection
from mmllm.training.projection_fit import (
    Autocast,
    ProjectionFit,
    collect_states,
    evaluating,
    trains,
)

Reply = tuple[int, ...]


def prealign(
    model: AnyToAny,
    items: Iterable[Rendered],
    cache: FeatureCache,
    stage: StageConfig,
    options: PrealignConfig,
    *,
    inputs: bool = True,
    autocast: Autocast = nullcontext,
    progress: bool = True,
) -> dict[str, float]:
    """Train the projections that are trainable, inputs first.

    Every process does the same from the same seed, so nothing is exchanged.

    Args:
        model: its trainable projections are changed.
        items: the conversations.
        cache: features of encoders and conditions of captions.
        stage: its seed and its distance of conditions.
        options: steps, batch size and learning rate.
        inputs: train the input projections too; without them this is realignment.
        autocast: context of a single forward pass, because it caches the weights that it casts.
        progress: show progress bars.

    Returns:
        By name, the accuracy of an input projection (share of media whose nearest reply is their
        own) or the last loss of an output projection.
    """
    items, fit = list(items), ProjectionFit(options, stage.seed, autocast, progress)
    scores = _prealign_inputs(model, items, cache, fit) if inputs else {}
    return scores | _prealign_outputs(model, items, cache, stage.align_loss, fit)


def _prealign_inputs(
    model: AnyToAny,
    items: list[Rendered],
    cache: FeatureCache,
    fit: ProjectionFit,
) -> dict[str, float]:
    scores = {}
    for key, pairs in _pairs(model, items).items():
        replies = list(dict.fromkeys(reply for _, reply in pairs))
        projection: Any = model.input_projections[key]
        if not trains(projection) or len(replies) < 2:
            continue
        place = {reply: index for index, reply in enumerate(replies)}
        media = [medium for medium, _ in pairs]
        owners = torch.tensor([place[reply] for _, reply in pairs])
        matcher = _matcher(projection)(model, cache, key, replies, fit.options.temperature)

        def loss(chosen: Tensor, matcher=matcher, media=media, owners=owners) -> Tensor:
            return matcher.loss([media[i] for i in chosen.tolist()], owners[chosen])

        name = f"input_projections.{key}"
        fit(name, projection, len(media), loss)
        with torch.no_grad(), evaluating(projection):
            near = [matcher.nearest(media[i : i + 64]) for i in range(0, len(media), 64)]
        scores[name] = (torch.cat(near).cpu() == owners).float().mean().item()
    return scores


def _prealign_outputs(
    model: AnyToAny,
    items: list[Rendered],
    cache: FeatureCache,
    distance: str,
    fit: ProjectionFit,
) -> dict[str, float]:
    keys = [key for key, module in model.output_projections.items() if trains(module)]
    with_outputs = [item for item in items if item.outputs]
    limit = fit.options.conversations
    if limit is not None and limit < len(with_outputs):
        with_outputs = random.Random(fit.seed).sample(with_outputs, limit)
    signals = collect_states(model, with_outputs, cache, keys, fit)
    scores = {}
    for key, kept in signals.items():
        projection, masks = model.output_projection(key), model.decoders[key].masks

        def loss(chosen: Tensor, kept=kept, projection=projection, masks=masks) -> Tensor:
            chosen = to_device(chosen, kept.states.device)
            targets = {name: value[chosen] for name, value in kept.targets.items()}
            condition = projection.conditions(kept.states[chosen], targets)
            return alignment_distance(condition, targets, masks, distance) / len(chosen)

        name = f"output_projections.{key}"
        scores[name] = fit(name, projection, len(kept.states), loss)
    return scores


def _matcher(projection: Any) -> type[_ReplyMatcher]:
    """What learns the replies about media."""
    if isinstance(projection, CTCProjection):
        return _Speller
    return _WordMatcher if projection.words else _TokenMatcher


def spell_replies(model: AnyToAny, replies: list[Reply], num_tokens: int) -> Tensor:
    """Return the LLM's embeddings of the tokens that distinguish each reply.

    These are the tokens that at most half of the replies have, in the reply's order: the rarest of
    them if there are more than N. If there are fewer, the last token of its text (a full stop, say)
    fills the rest.

    Args:
        model: the model, whose LLM has the embeddings.
        replies: R replies as token ids.
        num_tokens: N.

    Returns:
        float32[R, N, D].
    """
    table = model.llm.embedding.weight.detach()
    frequency = Counter(token for reply in replies for token in set(reply))
    rows = []
    for reply in replies:
        text = [token for token in reply if token not in model.llm.end_ids] or list(reply)
        own = [place for place, token in enumerate(text) if 2 * frequency[token] <= len(replies)]
        rarest = sorted(own, key=lambda place: frequency[text[place]])[:num_tokens]
        ids = [text[place] for place in sorted(rarest)]
        rows.append(ids + text[-1:] * (num_tokens - len(ids)))
    return table[torch.tensor(rows, device=table.device)].float()


def embed_replies(model: AnyToAny, replies: list[Reply]) -> Tensor:
    """Return the mean embedding of each reply's tokens, centred and normalised.

    Tokens are weighted by inverse document frequency: those of all replies have no weight.

    Args:
        model: the model, whose LLM has the embeddings.
        replies: R replies as token ids.

    Returns:
        float32[R, D].
    """
    table = model.llm.embedding.weight.detach()
    frequency = Counter(token for reply in replies for token in set(reply))
    rows = []
    for reply in replies:
        ids = torch.tensor(reply, device=table.device)
        weights = table.new_tensor([math.log(len(replies) / frequency[t]) for t in reply]).float()
        rows.append(weights @ table[ids].float() / weights.sum().clamp_min(1e-6))
    stacked = torch.stack(rows)
    return F.normalize(stacked - stacked.mean(0), dim=-1)


class _ReplyMatcher:
    """Matches the output of one input projection with the `replies` about its media."""

    def __init__(
        self,
        model: AnyToAny,
        cache: FeatureCache,
        key: str,
        replies: list[Reply],
        temperature: float,
    ):
        self.device, self.cache, self.key = model.device, cache, key
        self.projection: Any = model.input_projections[key]
        self.temperature = temperature

    def features(self, media: list[Medium]) -> tuple[Tensor, Tensor | None]:
        """float[M, L, C] and its mask."""
        features_of = self.cache.input_media(self.key, media)
        features, mask = features_of["features"], features_of["feature_mask"]
        assert features is not None
        mask = None if mask is None else to_device(mask, self.device)
        return to_device(features, self.device), mask

    def loss(self, media: list[Medium], owners: Tensor) -> Tensor:
        """The loss of a batch: `owners` are the indices of the replies about the media."""
        raise NotImplementedError

    def nearest(self, media: list[Medium]) -> Tensor:
        """The index of the reply that is nearest to each medium; -1: none."""
        raise NotImplementedError


class _TokenMatcher(_ReplyMatcher):
    """Compares each projected token with the mean LLM embedding of a reply."""

    def __init__(self, model: AnyToAny, *rest: Any):
        super().__init__(model, *rest)
        self.targets = embed_replies(model, rest[2])  # [R, D]

    def tokens(self, media: list[Medium]) -> Tensor:
        """Normalised projected tokens: float32[M, N, D]."""
        return F.normalize(self.projection(*self.features(media)).float(), dim=-1)

    def loss(self, media: list[Medium], owners: Tensor) -> Tensor:
        rows, own = (to_device(part, self.device) for part in owners.unique(return_inverse=True))
        tokens = self.tokens(media)
        logits = tokens @ self.targets[rows].T / self.temperature
        return F.cross_entropy(logits.flatten(0, 1), own.repeat_interleave(tokens.shape[1]))

    def nearest(self, media: list[Medium]) -> Tensor:
        return (self.tokens(media) @ self.targets.T).mean(1).argmax(1)


class _WordMatcher(_ReplyMatcher):
    """Makes each reply a word of the projection's own vocabulary, initialised with the LLM's
    embeddings, and trains the projection's classifier."""

    def __init__(self, model: AnyToAny, *rest: Any):
        super().__init__(model, *rest)
        key, replies = rest[1], rest[2]
        words = self.projection.words
        if len(replies) > words:
            raise ConfigError(
                f"input_projections.{key}: {len(replies)} different replies to pre-align with, but "
                f"words={words}; raise it, or choose another type of projection"
            )
        self.projection.set_words(spell_replies(model, replies, self.projection.num_tokens))

    def scores(self, media: list[Medium]) -> Tensor:
        return self.projection.scores(*self.features(media)).float()

    def loss(self, media: list[Medium], owners: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(media), to_device(owners, self.device))

    def nearest(self, media: list[Medium]) -> Tensor:
        return self.scores(media).argmax(1)


def _pairs(model: AnyToAny, items: Iterable[Rendered]) -> dict[str, list[tuple[Medium, Reply]]]:
    """Distinct (medium, reply) of the conversations with one input medium, by encoder key."""
    found: dict[tuple[str, str, Reply], tuple[Medium, Reply]] = {}
    vocabulary = model.llm.embedding.num_embeddings
    for item in items:
        if len(item.inputs) != 1 or item.outputs:
            continue
        reply = tuple(label for label in item.labels if 0 <= label < vocabulary)
        place = item.inputs[0]
        found[place.key, medium_identity(place.medium), reply] = (place.medium, reply)
    grouped: dict[str, list[tuple[Medium, Reply]]] = {}
    for (key, _, _), pair in found.items():
        grouped.setdefault(key, []).append(pair)
    return grouped


class _Speller(_ReplyMatcher):
    """Makes the tokens of the replies the projection's vocabulary, with the LLM's embeddings, and
    trains it to spell the replies, without the tokens that all of them have."""

    def __init__(self, model: AnyToAny, *rest: Any):
        super().__init__(model, *rest)
        key, replies = rest[1], rest[2]
        common = set(replies[0]).intersection(*replies)  # "I see", say, and the end
        self.replies = [tuple(token for token in reply if token not in common) for reply in replies]
        ids = sorted({token for reply in self.replies for token in reply})
        longest = max(map(len, self.replies))
        for name, needed in (("vocabulary", len(ids)), ("num_tokens", longest)):
            if needed > getattr(self.projection, name):
                raise ConfigError(
                    f"input_projections.{key}: the replies to pre-align with need {name}={needed}, "
                    f"but it is {getattr(self.projection, name)}; raise it"
                )
        table = model.llm.embedding.weight.detach()
        self.projection.set_vocabulary(ids, table[torch.tensor(ids, device=table.device)].float())
        place = {token: index for index, token in enumerate(ids)}
        self.targets = [[place[token] for token in reply] for reply in self.replies]
        self.places = {reply: index for index, reply in enumerate(self.replies)}

    def loss(self, media: list[Medium], owners: Tensor) -> Tensor:
        features, mask = self.features(media)
        return self.projection.loss(features, mask, [self.targets[i] for i in owners.tolist()])

    def nearest(self, media: list[Medium]) -> Tensor:
        spelled = self.projection.read(self.projection.scores(*self.features(media)))
        return torch.tensor([self.places.get(reply, -1) for reply in spelled])
