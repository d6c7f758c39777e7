"""What teaching changes in a projection: its words or names and the classifier that chooses one.

A learner knows one type of projection. What is in front of the classifier is frozen, so its input
is computed once for each medium.

Legend: M media, L encoder tokens, C encoder width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import ConfigError
from mmllm.model import AnyToAny
from mmllm.projections.ctc import CTCConfig, CTCProjection
from mmllm.projections.input import WordsConfig, WordsProjection
from mmllm.training.prealign import spell_replies

_ANSWER = "This is {}."


class Learner(ABC):
    """A projection that is taught: a linear classifier of mean features, which a medium is read by.

    Args:
        model: the model; its config follows the projection.
        key: the encoder's.
    """

    projection: Any

    def __init__(self, model: AnyToAny, key: str):
        self.model, self.key = model, key
        self.projection = model.input_projections[key]

    @property
    @abstractmethod
    def classifier(self) -> nn.Linear:
        """What is trained; adding captions replaces it."""

    def inputs(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the classifier's input of media: float32[M, C].

        Args:
            features: float[M, L, C] of the encoder.
            mask: bool[M, L], True for tokens that count; None: all.
        """
        return self.projection.mean_feature(features, mask).float()

    def read(self, inputs: Tensor) -> list[int]:
        """What each medium is read as: the likeliest class.

        Args:
            inputs: as `inputs` returns them.
        """
        return self.classifier(inputs).argmax(dim=-1).tolist()

    @abstractmethod
    def add(
        self, captions: Sequence[str], rehearsed: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, int], list[str]]:
        """Make every caption one that media can be read as.

        Args:
            captions: the captions to teach.
            rehearsed: what the rehearsed media of each caption are read as.

        Returns:
            What a medium of each caption is to be read as, and the captions that are new.

        Raises:
            ConfigError: a caption is longer than the projection spells.
        """

    def loss(self, logits: Tensor, readings: Sequence[int]) -> Tensor:
        """Compute the mean loss of media.

        Args:
            logits: the classifier's output.
            readings: what each medium is to be read as.
        """
        return F.cross_entropy(logits, torch.tensor(readings, device=logits.device))

    def rehearsal_loss(self, logits: Tensor, before: Tensor) -> Tensor:
        """Compute the loss of rehearsed media: the choice is kept, and may become surer. Scores of
        words that stay as flat as they were name 0.70 of 40 new images of `mini`, this 0.80.

        Args:
            logits: the classifier's output.
            before: that of the classifier before teaching, which had fewer classes.
        """
        return F.cross_entropy(logits, before.argmax(dim=-1))

    def _set_config(self, **changes: Any) -> None:
        config = self.model.config
        projections = dict(config.input_projections)
        projections[self.key] = replace(projections[self.key], **changes)
        self.model.config = replace(config, input_projections=projections)


class WordLearner(Learner):
    """Learns words of a WordsProjection: a medium is read as the index of a word."""

    projection: WordsProjection

    @property
    def classifier(self) -> nn.Linear:
        return self.projection.classifier

    def add(
        self, captions: Sequence[str], rehearsed: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, int], list[str]]:
        """See Learner. Captions without a word get a new one, spelled as the LLM does."""
        words = {caption: max(set(found), key=found.count) for caption, found in rehearsed.items()}
        added = [caption for caption in captions if caption not in words]
        if added:
            spoken = [self._reply(caption) for caption in dict.fromkeys([*added, *words])]
            spelled = spell_replies(self.model, spoken, self.projection.num_tokens)
            first = self.projection.add_words(spelled[: len(added)])
            words |= {caption: first + index for index, caption in enumerate(added)}
            self._set_config(words=self.projection.words)
        return words, added

    def _reply(self, caption: str) -> tuple[int, ...]:
        tokenizer = self.model.llm.tokenizer
        return tuple(tokenizer.encode(_ANSWER.format(caption), add_special_tokens=False))


class NameLearner(Learner):
    """Learns names of a CTCProjection: a medium is read as the number of a name, or as 0, and then
    it is spelled."""

    projection: CTCProjection

    def __init__(self, model: AnyToAny, key: str):
        super().__init__(model, key)
        if self.projection.namer is None:
            self.projection.add_names([], model.llm.embed)

    @property
    def classifier(self) -> nn.Linear:
        assert self.projection.namer is not None
        return self.projection.namer

    def add(
        self, captions: Sequence[str], rehearsed: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, int], list[str]]:
        """See Learner. Captions that are no name become one, tokenized as within a text, which is
        how pre-alignment spells replies."""
        encode = self.model.llm.tokenizer.encode
        spelled = {
            caption: tuple(encode(" " + caption, add_special_tokens=False)) for caption in captions
        }
        known = set(self.projection.names())
        added = [caption for caption, name in spelled.items() if name not in known]
        longest = self.projection.num_tokens
        for caption in added:
            length = len(spelled[caption])
            if not 0 < length <= longest:
                raise ConfigError(
                    f"input_projections.{self.key}: {caption!r} has {length} tokens, but the "
                    f"projection spells 1 to {longest}; choose a shorter label"
                )
        self.projection.add_names([spelled[caption] for caption in added], self.model.llm.embed)
        names = self.projection.names()
        self._set_config(names=len(names))
        number = {name: index for index, name in enumerate(names, 1)}
        return {caption: number[name] for caption, name in spelled.items()}, added

    def forget(self) -> None:
        """Begin anew: no names. `add` comes before `classifier` is read again."""
        self.projection.forget_names()
        self._set_config(names=0)


LEARNERS: dict[type, type[Learner]] = {WordsConfig: WordLearner, CTCConfig: NameLearner}
"""Config of a projection that can be taught -> its learner."""
