"""What teaching changes in a projection: its vocabulary and the classifier that chooses from it.

A learner knows one type of projection. Its parts in front of the classifier are frozen, so their
output is computed once for each medium.

Legend: M media, R new words or tokens, D LLM width.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import ConfigError
from mmllm.model import AnyToAny
from mmllm.projections.ctc import CTCConfig, CTCProjection, ctc_loss
from mmllm.projections.input import WordsConfig, WordsProjection
from mmllm.training.prealign import spell_replies

_ANSWER = "This is {}."


class Learner(ABC):
    """A projection that is taught.

    Args:
        model: the model; its config follows the projection.
        key: the encoder's.
    """

    def __init__(self, model: AnyToAny, key: str):
        self.model, self.key = model, key

    @property
    @abstractmethod
    def classifier(self) -> nn.Linear:
        """What is trained; adding captions replaces it."""

    @abstractmethod
    def inputs(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the classifier's input of media: float[M, ...].

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.
        """

    @abstractmethod
    def read(self, inputs: Tensor) -> list[Any]:
        """What each medium is read as: something hashable.

        Args:
            inputs: as `inputs` returns them.
        """

    @abstractmethod
    def add(
        self, captions: Sequence[str], rehearsed: Mapping[str, Sequence[Hashable]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Make every caption one that media can be read as.

        Args:
            captions: the captions to teach.
            rehearsed: what the rehearsed media of each caption are read as.

        Returns:
            What a medium of each caption is to be read as, and the captions that are new.

        Raises:
            ConfigError: a caption is longer than the projection spells.
        """

    @abstractmethod
    def loss(self, logits: Tensor, readings: Sequence[Any]) -> Tensor:
        """Compute the mean loss of media.

        Args:
            logits: the classifier's output.
            readings: what each medium is to be read as.
        """

    def rehearsal_loss(self, logits: Tensor, before: Tensor) -> Tensor:
        """Compute how far the scores of rehearsed media are from what they were.

        Args:
            logits: the classifier's output.
            before: that of the classifier before teaching, which had fewer classes.
        """
        return _divergence(before, logits)

    def _set_config(self, **changes: Any) -> None:
        config = self.model.config
        projections = dict(config.input_projections)
        projections[self.key] = replace(projections[self.key], **changes)
        self.model.config = replace(config, input_projections=projections)


class WordLearner(Learner):
    """Learns words of a WordsProjection: a medium is read as the index of a word."""

    def __init__(self, model: AnyToAny, key: str):
        super().__init__(model, key)
        projection = model.input_projections[key]
        assert isinstance(projection, WordsProjection)
        self.projection = projection

    @property
    def classifier(self) -> nn.Linear:
        return self.projection.classifier

    def inputs(self, features: Tensor, mask: Tensor | None) -> Tensor:
        return self.projection.mean_feature(features, mask).float()

    def read(self, inputs: Tensor) -> list[int]:
        return self.classifier(inputs).argmax(dim=-1).tolist()

    def add(
        self, captions: Sequence[str], rehearsed: Mapping[str, Sequence[Hashable]]
    ) -> tuple[dict[str, Any], list[str]]:
        """See Learner. Captions without a word get a new one, spelled as the LLM does."""
        words: dict[str, Any] = {
            caption: max(set(found), key=found.count) for caption, found in rehearsed.items()
        }
        added = [caption for caption in captions if caption not in words]
        if added:
            spoken = [self._reply(caption) for caption in dict.fromkeys([*added, *words])]
            spelled = spell_replies(self.model, spoken, self.projection.num_tokens)
            first = self.projection.add_words(spelled[: len(added)])
            words |= {caption: first + index for index, caption in enumerate(added)}
            self._set_config(words=self.projection.words)
        return words, added

    def loss(self, logits: Tensor, readings: Sequence[int]) -> Tensor:
        return F.cross_entropy(logits, torch.tensor(readings, device=logits.device))

    def rehearsal_loss(self, logits: Tensor, before: Tensor) -> Tensor:
        """See Learner: the choice is kept, and may become surer; scores that stay as flat as they
        were name 0.70 of 40 new images of `mini`, this 0.80."""
        return F.cross_entropy(logits, before.argmax(dim=-1))

    def _reply(self, caption: str) -> tuple[int, ...]:
        tokenizer = self.model.llm.tokenizer
        return tuple(tokenizer.encode(_ANSWER.format(caption), add_special_tokens=False))


class SpellingLearner(Learner):
    """Learns descriptions of a CTCProjection: a medium is read as the LLM's token ids."""

    def __init__(self, model: AnyToAny, key: str):
        super().__init__(model, key)
        projection = model.input_projections[key]
        assert isinstance(projection, CTCProjection)
        projection.find_ids(model.llm.embedding.weight.detach())
        self.projection = projection
        self.places = _places(projection.ids)

    @property
    def classifier(self) -> nn.Linear:
        return self.projection.classifier

    def inputs(self, features: Tensor, mask: Tensor | None) -> Tensor:
        return self.projection.states(features, mask).float()

    def read(self, inputs: Tensor) -> list[tuple[int, ...]]:
        return self.projection.read(self.classifier(inputs))

    def add(
        self, captions: Sequence[str], rehearsed: Mapping[str, Sequence[Hashable]]
    ) -> tuple[dict[str, Any], list[str]]:
        """See Learner. A caption is known if all its rehearsed media are read as it; tokens of the
        others that the vocabulary lacks are appended to it."""
        spelled = self._spell(captions, rehearsed)
        new = [
            caption
            for caption in captions
            if any(found != spelled[caption] for found in rehearsed.get(caption, [None]))
        ]
        for caption in new:
            self._check_length(caption, spelled[caption])
        added = sorted({token for caption in new for token in spelled[caption]} - set(self.places))
        if added:
            table = self.model.llm.embedding.weight.detach()
            rows = table[torch.tensor(added, device=table.device)].float()
            self.projection.add_vocabulary(added, rows)
            self.places = _places(self.projection.ids)
            self._set_config(vocabulary=self.projection.vocabulary)
        return spelled, new

    def loss(self, logits: Tensor, readings: Sequence[tuple[int, ...]]) -> Tensor:
        return ctc_loss(logits, [[self.places[token] for token in read] for read in readings])

    def _spell(
        self, captions: Sequence[str], rehearsed: Mapping[str, object]
    ) -> dict[str, tuple[int, ...]]:
        """Captions as pre-alignment spells replies: as they are tokenized within a text, and
        without the tokens that all replies have, which are no part of the vocabulary."""
        tokenizer = self.model.llm.tokenizer
        spelled = {
            caption: tokenizer.encode(" " + caption, add_special_tokens=False)
            for caption in [*captions, *rehearsed]
        }
        common = set.intersection(*(set(spelled[caption]) for caption in rehearsed or captions))
        common = common - set(self.places) if len(rehearsed) > 1 else set()
        return {
            caption: tuple(token for token in spelled[caption] if token not in common)
            for caption in captions
        }

    def _check_length(self, caption: str, spelled: tuple[int, ...]) -> None:
        """Raise ConfigError for a caption that no path says."""
        repeats = sum(one == other for one, other in itertools.pairwise(spelled))
        steps = self.projection.queries.shape[0]
        if not 0 < len(spelled) <= self.projection.num_tokens or len(spelled) + repeats > steps:
            raise ConfigError(
                f"input_projections.{self.key}: {caption!r} has {len(spelled)} tokens and "
                f"{repeats} repetitions, but the projection spells 1 to "
                f"{self.projection.num_tokens} tokens in {steps} steps; choose a shorter label"
            )


def _places(ids: Tensor) -> dict[int, int]:
    """Token of the LLM -> its place in a vocabulary."""
    return {token: place for place, token in reversed(list(enumerate(ids.tolist()))) if token >= 0}


LEARNERS: dict[type, type[Learner]] = {WordsConfig: WordLearner, CTCConfig: SpellingLearner}
"""Config of a projection that can be taught -> its learner."""


def _divergence(before: Tensor, now: Tensor) -> Tensor:
    """The mean KL divergence of the scores now from those before: logits float[..., K + R] and
    float[..., K]."""
    was, is_now = before.log_softmax(-1), now.log_softmax(-1)[..., : before.shape[-1]]
    return (was.exp() * (was - is_now)).sum(-1).mean()
