"""What reasoning programs ask of a language model, and limits on how much they may ask.

`mmllm.Chat` is a ChatModel; so are an OpenAI-compatible endpoint (`endpoint`), a scripted model for
tests (`scripted`), and what wraps another model: a recorder (`recorder`) and a budget (here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from mmllm.conversation import Message, assistant
from mmllm.errors import ConfigError, MmllmError


class CallError(MmllmError, RuntimeError):
    """A call of a model that failed: a time-out, an HTTP error, an answer that is no completion."""


class BudgetError(MmllmError, RuntimeError):
    """The next call would exceed the budget; it was not made."""


@dataclass(frozen=True)
class Completion:
    """One sampled reply.

    Attributes:
        text: the reply.
        prompt_tokens: tokens of the prompt, counted with the first of the samples of a call; 0 for
            the others.
        completion_tokens: tokens of the reply.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatModel(Protocol):
    """A language model: text (and, where it reads them, media) in, text out."""

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
        """Sample up to `n` replies to one conversation; the same seed gives the same replies.

        Args:
            conversation: the messages, the user's last.
            n: the number of replies; fewer come back if some fail.
            temperature: that of sampling; 0 is greedy.
            max_new_tokens: maximum length of a reply.
            stop: texts before which a reply ends.
            seed: the seed of the first reply.

        Raises:
            CallError: the call failed, and gave no reply at all.
        """
        ...

    def score(self, conversation: Sequence[Message], replies: Sequence[str]) -> list[float]:
        """Return log p of each text as the whole reply.

        Args:
            conversation: the messages, the user's last.
            replies: the texts.

        Raises:
            ConfigError: this model gives no likelihoods.
            CallError: the call failed.
        """
        ...

    def count_tokens(self, conversation: Sequence[Message]) -> int:
        """Tokens of a prompt: the exact number, or one that is certainly not too small."""
        ...

    @property
    def fingerprint(self) -> str:
        """A name of the model and its weights; equal ones give equal likelihoods."""
        ...


@dataclass(frozen=True)
class CallUsage:
    """What was asked of a model.

    Attributes:
        calls: calls of `complete` and `score`, failed ones included.
        failed: how many of these failed.
        prompt_tokens: tokens of prompts, those of failed calls included.
        completion_tokens: tokens of sampled replies, and of the replies that were scored.
    """

    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.prompt_tokens + self.completion_tokens


@dataclass
class Budget:
    """A ChatModel that counts what is asked of another one, and keeps it within limits.

    A call that could exceed a limit, if every sample were as long as it may be, is not made. Calls
    are never changed, so that a record of them fits a later run with a larger budget.

    Attributes:
        model: the model that answers.
        max_calls: limit of calls; None for no limit.
        max_tokens: limit of tokens of prompts and replies; None for no limit.
        usage: what was asked so far.
    """

    model: ChatModel
    max_calls: int | None = None
    max_tokens: int | None = None
    usage: CallUsage = field(default_factory=CallUsage)

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")

    @property
    def fingerprint(self) -> str:
        """That of the model inside."""
        return self.model.fingerprint

    def count_tokens(self, conversation: Sequence[Message]) -> int:
        """See ChatModel; it costs no call."""
        return self.model.count_tokens(conversation)

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
        """See ChatModel. Raises BudgetError, too."""
        num_prompt = self.count_tokens(conversation)
        self._check(num_prompt + n * max_new_tokens)
        self._count(calls=1)
        try:
            completions = self.model.complete(
                conversation,
                n=n,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                stop=stop,
                seed=seed,
            )
        except CallError:
            self._count(failed=1, prompt_tokens=num_prompt)
            raise
        self._count(
            prompt_tokens=sum(entry.prompt_tokens for entry in completions),
            completion_tokens=sum(entry.completion_tokens for entry in completions),
        )
        return completions

    def score(self, conversation: Sequence[Message], replies: Sequence[str]) -> list[float]:
        """See ChatModel. Raises BudgetError, too."""
        num_prompt = self.count_tokens(conversation)
        num_replies = sum(
            self.count_tokens([*conversation, assistant(reply)]) - num_prompt for reply in replies
        )
        self._check(num_prompt + num_replies)
        self._count(calls=1, prompt_tokens=num_prompt, completion_tokens=num_replies)
        try:
            return self.model.score(conversation, replies)
        except CallError:
            self._count(failed=1)
            raise

    def _check(self, num_tokens: int) -> None:
        """Raise BudgetError unless one more call of so many tokens is within the limits."""
        if self.max_calls is not None and self.usage.calls >= self.max_calls:
            raise BudgetError(
                f"the budget of {self.max_calls} calls is spent; allow more with max_calls"
            )
        if self.max_tokens is not None and self.usage.tokens + num_tokens > self.max_tokens:
            raise BudgetError(
                f"the next call may take {num_tokens} tokens, but of the budget of "
                f"{self.max_tokens} tokens {self.usage.tokens} are spent; allow more with "
                "max_tokens"
            )

    def _count(self, **more: int) -> None:
        for name, number in more.items():
            self.usage = replace(self.usage, **{name: getattr(self.usage, name) + number})
