"""A model whose replies a function writes: for tests, and as an optimizer of known rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from mmllm.conversation import Message
from mmllm.errors import ConfigError
from mmllm.reasoning.models import Completion

Rule = Callable[[str, random.Random], str]
"""(text of the last message, source of randomness) -> a reply."""


class ScriptedModel:
    """A ChatModel whose replies are a function of the last message.

    Args:
        rule: writes one reply.
        likelihood: (text of the last message, reply) -> log p of the reply, for `score`.

    Attributes:
        conversations: those that were asked to be completed, in order.
    """

    def __init__(self, rule: Rule, likelihood: Callable[[str, str], float] | None = None):
        self.rule = rule
        self.likelihood = likelihood
        self.conversations: list[Sequence[Message]] = []

    @property
    def fingerprint(self) -> str:
        """The name of the rule."""
        return f"scripted:{getattr(self.rule, '__qualname__', type(self.rule).__qualname__)}"

    def count_tokens(self, conversation: Sequence[Message]) -> int:
        """The number of words."""
        return sum(len(message.text.split()) for message in conversation)

    def complete(
        self,
        conversation: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Completion]:
        """See ChatModel. A reply has at most `max_new_tokens` words, and ends before `stop`."""
        self.conversations.append(conversation)
        completions = []
        for number in range(n):
            text = self.rule(conversation[-1].text, random.Random(seed + number))
            for end in stop:
                text = text.partition(end)[0]
            if len(text.split()) > max_new_tokens:
                text = " ".join(text.split()[:max_new_tokens])
            prompt = 0 if number else self.count_tokens(conversation)
            completions.append(Completion(text, prompt, len(text.split())))
        return completions

    def score(self, conversation: Sequence[Message], replies: Sequence[str]) -> list[float]:
        """See ChatModel."""
        if self.likelihood is None:
            raise ConfigError("this scripted model gives no likelihoods; give it `likelihood`")
        return [self.likelihood(conversation[-1].text, reply) for reply in replies]
