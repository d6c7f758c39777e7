"""Sampling: the options of a request, and logits -> the index of one token.

Legend: V text vocabulary, O outputs.
"""

# Values of users are checked at run time, whatever the annotation.
# pyright: reportUnnecessaryIsInstance=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from mmllm.errors import ConfigError, quoted
from mmllm.inference.options import MODALITY_CHOICES, ModalityChoice
from mmllm.kernels.devices import to_device

_GREEDY_TEMPERATURE = 1e-5
"""Temperatures below it decode greedily: logits divided by less would overflow."""
_MAX_TEMPERATURE = 1000.0
"""Temperature at which all tokens are about equally likely."""
_MAX_PENALTY = 100.0
"""Largest `repetition_penalty`; its inverse is the smallest. Penalised logits stay finite."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a reply are sampled.

    Attributes:
        max_new_tokens: limit of text tokens.
        temperature: below 1e-5 decoding is greedy.
        top_p: sample from the smallest set of tokens whose probabilities add up to it.
        top_k: sample from the k likeliest tokens; 0: from all.
        repetition_penalty: divides positive logits of tokens that were generated before, and
            multiplies negative ones.
        max_media: limit of media in a reply.
        stop: strings before the first of which the text ends. The token ids then hold the
            beginning of the string, or all of it.
        num_draft_tokens: most draft tokens that one forward pass verifies
            (mmllm.inference.speculative); 0 decodes one token per pass.
        modalities: modality -> auto, force or forbid. Forced media come in the order of this
            mapping, at the end of the text at the latest.

    Raises:
        ConfigError: for a value out of range, with its name and the range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_media: int = 4
    stop: Sequence[str] = ()
    num_draft_tokens: int = 15
    modalities: Mapping[str, ModalityChoice] = field(default_factory=dict[str, ModalityChoice])

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_numbers()
        is_list = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        if not is_list or not all(isinstance(entry, str) and entry for entry in self.stop):
            raise ConfigError(
                f"stop: expected a list of strings that are not empty, got {quoted(self.stop)}"
            )
        for modality, choice in self.modalities.items():
            if choice not in MODALITY_CHOICES:
                raise ConfigError(
                    f"modalities[{quoted(modality)}]: expected auto, force or forbid, got "
                    f"{quoted(choice)}"
                )

    def _check_counts(self) -> None:
        for name, minimum in (
            ("max_new_tokens", 1),
            ("max_media", 0),
            ("top_k", 0),
            ("num_draft_tokens", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < minimum:
                raise ConfigError(
                    f"{name}: expected a whole number of at least {minimum}, got {quoted(value)}"
                )

    def _check_numbers(self) -> None:
        for name, minimum, maximum in (
            ("temperature", 0, _MAX_TEMPERATURE),
            ("top_p", 0, 1),
            ("repetition_penalty", 1 / _MAX_PENALTY, _MAX_PENALTY),
        ):
            value: Any = getattr(self, name)
            # NaN fails every comparison.
            if not isinstance(value, Real) or not minimum <= value <= maximum:  # pyright: ignore
                raise ConfigError(
                    f"{name}: expected a number from {minimum:g} to {maximum:g}, got "
                    f"{quoted(value)}"
                )
        if self.top_p == 0:
            raise ConfigError("top_p: expected more than 0, got 0; greedy is a temperature of 0")

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is deterministic: equal prompts give equal tokens."""
        return self.temperature < _GREEDY_TEMPERATURE


def sample_logits(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Sample one index by temperature, top-k and top-p.

    Args:
        logits: float32[V + O]; -inf for what must not be sampled.
        sampling: the options.
        generator: a generator of the CPU, which draws the same noise whatever the device.

    Returns:
        int[1] on the device of the logits, so that the host does not wait for it; -1 if a logit is
        NaN.
    """
    if sampling.is_greedy:
        return _argmax(logits)
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    # The exponential race by which torch.multinomial draws on a CPU.
    noise = torch.empty(len(probabilities), pin_memory=probabilities.device.type == "cuda")
    noise.exponential_(1, generator=generator)
    rank = _argmax(probabilities / to_device(noise, probabilities.device))
    return torch.where(rank < 0, rank, order.gather(0, rank.clamp_min(0)))


def _argmax(values: Tensor) -> Tensor:
    """float[N] -> index of the largest, int[1]; -1 if one is NaN."""
    index = values.argmax(keepdim=True)
    return torch.where(values.gather(0, index).isnan(), -1, index)
