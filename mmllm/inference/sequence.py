"""The state of one sequence that is being generated: its constraints, what it is fed next, and its
output as it grows.

A signal span that has begun is always completed: its K tokens are fed in one forward pass, and
nothing else is sampled in between.

Legend: V text vocabulary, O outputs, W positions of a step, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from itertools import takewhile

import torch
from torch import Tensor

from mmllm.errors import ConfigError
from mmllm.inference.outputs import GenerationOutput, Piece, SignalSpan, decode_text
from mmllm.inference.sampling import Sampling, sample_logits
from mmllm.inference.speculative import PromptLookupDraft
from mmllm.kernels.devices import to_device
from mmllm.model import AnyToAny


class SequenceState:
    """One sequence. A step samples a logit index (`sample`), turns it into the ids to feed next
    (`advance`), feeds them, and records their hidden states (`accept`).

    Attributes:
        output: what has been generated.
        done: whether nothing more comes. Others may set it, which takes the sequence out of its
            batch.
        error: why the sequence was given up.
        position: position of the next token.
        next_ids: what is fed next: one token or a whole signal span; empty while it is still to be
            sampled, and at the end.
        cache_keys: what was fed, by position (`prefix_cache.cache_keys`); empty for a sequence
            whose key-value cache is not to be kept.
        draft: the ids of the conversation, `next_ids` included, to draft from.
        may_draft: whether drafts are proposed; not while a forward hook is on the LLM, which is to
            see no position that is rejected.
        pending_forced: output keys whose forced media have not been generated yet, in order.
        forbidden: output keys that must not be sampled.
    """

    def __init__(
        self,
        model: AnyToAny,
        sampling: Sampling,
        generator: torch.Generator,
        events: deque[tuple[SequenceState, Piece]] | None = None,
    ):
        """`events`: a queue to which every new piece is appended, with this sequence."""
        self.tokens = model.llm.tokens
        self.tokenizer = model.llm.tokenizer
        self.end_ids = sorted(model.llm.end_ids)
        self.sampling = sampling
        self.generator = generator
        self.output = GenerationOutput()
        self.done = False
        self.error: BaseException | None = None
        self.position = 0
        self.next_ids: list[int] = []
        self.cache_keys: list[Hashable] = []
        self.draft = PromptLookupDraft()
        self.may_draft = True
        self._events = events
        self._num_words = model.batch_layout.num_words
        self._words = deque[Tensor](maxlen=max(self._num_words.values(), default=0))
        """States of the last text tokens since a medium, for projections that read them."""
        self._generated_ids: set[int] = set()
        self._has_stopped = False
        self._text_is_over = False
        """Whether the text would have ended with the last sampled index."""
        keys = model.renderer.output_keys
        for modality, choice in sampling.modalities.items():
            if modality not in keys and choice == "force":
                raise ConfigError(
                    f"modalities: cannot force {modality!r}; this model makes "
                    f"{', '.join(sorted(keys)) or 'text only'}"
                )
        choices = {key: sampling.modalities.get(modality, "auto") for modality, key in keys.items()}
        self.forbidden = {
            key for key in self.tokens.outputs if choices.get(key, "forbid") == "forbid"
        }
        self.pending_forced = [
            keys[modality] for modality, choice in sampling.modalities.items() if choice == "force"
        ]

    def sample(self, logits: Tensor) -> Tensor:
        """float[V + O] -> one index, int[1] on their device; -1 if a logit is NaN. The host does
        not wait for the device."""
        return sample_logits(self.constrain(logits.float()), self.sampling, self.generator)

    def constrain(self, logits: Tensor) -> Tensor:
        """float[V + O] -> the same with forbidden outputs, a full reply and repetitions applied."""
        logits = logits.clone()
        is_full = len(self.output.spans) >= self.sampling.max_media
        for key in self.tokens.outputs:
            if key in self.forbidden or is_full:
                logits[self.tokens.logit_index(key)] = -torch.inf
        penalty = self.sampling.repetition_penalty
        if penalty != 1 and self._generated_ids:
            ids = to_device(torch.tensor(sorted(self._generated_ids)), logits.device)
            values = logits[ids]
            logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
        return logits

    def advance(self, index: int) -> None:
        """Set `next_ids` to what a sampled logit index begins.

        Raises:
            ConfigError: for -1, which `sample` gives where logits are NaN.
        """
        if index < 0 and not self.done:
            raise ConfigError(
                "the LLM's logits are not numbers: something overflows in its dtype, or its "
                "weights hold NaN; load the model with dtype bfloat16 or float32"
            )
        self.next_ids = [] if self.done else self._ids_of(index)
        self.draft.extend(self.next_ids)

    def propose_draft(self) -> list[list[int]]:
        """Pieces that may be sampled after `next_ids`, as their ids: tokens that followed the same
        ids before, or the span of the next forced medium."""
        if not (self.next_ids and self.may_draft and self.sampling.num_draft_tokens):
            return []
        if self._text_is_over:
            return [self.tokens.signal_ids(key) for key in self.pending_forced[1:2]]
        num_left = self.sampling.max_new_tokens - len(self.output.ids)
        proposed = self.draft.propose(min(self.sampling.num_draft_tokens, num_left))
        return [[token] for token in takewhile(self._is_text, proposed)]

    def accept(self, states: Tensor) -> None:
        """Record that `next_ids` were fed and gave the hidden states float[len(next_ids), D], which
        are kept if the ids are a signal span, or words that its projection reads. What follows is
        still to be sampled."""
        ids, self.next_ids = self.next_ids, []
        self.position += len(ids)
        if self.cache_keys:
            self.cache_keys += ids
        key = self.tokens.output_of_first_id(ids[0])
        if key is not None:
            if key in self.pending_forced:
                self.pending_forced.remove(key)
            self.append(SignalSpan(key, self._with_words(key, states)))
            self._words.clear()
        elif self._words.maxlen:
            self._words.extend(states.clone())

    def append(self, piece: Piece) -> None:
        """Add a piece to the output and to the queue of events."""
        self.output.pieces.append(piece)
        if self._events is not None:
            self._events.append((self, piece))

    def _with_words(self, key: str, states: Tensor) -> Tensor:
        """Put the states of the words that a projection reads in front of those of a signal span,
        and zeros where there are too few: float[K, D] -> float[W + K, D]."""
        num = self._num_words.get(key, 0)
        words = list(self._words)[max(len(self._words) - num, 0) :]
        padding = states.new_zeros(num - len(words), states.shape[1])
        return torch.cat([padding, *(word[None] for word in words), states])

    def _ids_of(self, index: int) -> list[int]:
        """The ids that a sampled index begins; none at the end."""
        is_end = index in self.end_ids
        is_full = len(self.output.ids) >= self.sampling.max_new_tokens
        self._text_is_over = self._has_stopped or is_end or is_full
        if self._text_is_over:
            if self.pending_forced:
                return self.tokens.signal_ids(self.pending_forced[0])
            self.done = True
            self.output.finish = "stop" if self._has_stopped else "end" if is_end else "length"
            return []
        key = self.tokens.output_of_logit(index)
        if key is not None:
            return self.tokens.signal_ids(key)
        self._generated_ids.add(index)
        self.append(index)
        self._has_stopped = self._ends_in_stop_string()
        return [index]

    def _is_text(self, token: int) -> bool:
        return token < self.tokens.vocab_size and token not in self.end_ids

    def _ends_in_stop_string(self) -> bool:
        """Whether the text since the last signal span holds a stop string near its end."""
        if not self.sampling.stop:
            return False
        tail: list[int] = []
        # A token is one byte or more.
        max_tokens = max(len(stop.encode()) for stop in self.sampling.stop)
        for piece in reversed(self.output.pieces):
            if isinstance(piece, SignalSpan) or len(tail) > max_tokens:
                break
            tail.insert(0, piece)
        text = decode_text(self.tokenizer, tail)
        return any(stop in text for stop in self.sampling.stop)
