"""Caesar ciphers: asking a model to decode, and testing all 26 candidates with it.

Language models decode by themselves only the shifts that texts on the Internet have (McCoy et al.
2023, "Embers of Autoregression", arXiv:2309.13638). The same model as the test of candidates that a
program enumerates decodes every shift.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from mmllm.conversation import user
from mmllm.reasoning.models import ChatModel

NUM_SHIFTS = 26


@dataclass(frozen=True)
class Decoding:
    """The best candidate of `decode_by_test`.

    Attributes:
        text: the decoded text.
        shift: by which it had been encoded.
        scores: log p of the candidate of each shift, 0 to 25.
    """

    text: str
    shift: int
    scores: tuple[float, ...]


def encode(text: str, shift: int) -> str:
    """Replace each of the 26 letters by a later one; the negative shift decodes.

    Args:
        text: the text; other characters stay.
        shift: by how many places.

    Example:
        >>> encode("Hello, Zoe!", 1)
        'Ifmmp, Apf!'
    """
    shift %= NUM_SHIFTS
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    table = str.maketrans(
        lower + upper, lower[shift:] + lower[:shift] + upper[shift:] + upper[:shift]
    )
    return text.translate(table)


def decode_directly(
    model: ChatModel, ciphertext: str, shift: int, *, max_new_tokens: int = 64
) -> str:
    """Ask the model to decode, with the shift named and an example of it; returns its reply.

    Args:
        model: asked, greedily.
        ciphertext: the encoded text.
        shift: by which it was encoded.
        max_new_tokens: of the reply.
    """
    example = "Stay here!"
    question = (
        f"Rot-{shift} is a cipher in which each letter is shifted {shift} positions forward in the "
        f'alphabet. For example, "{example}" becomes "{encode(example, shift)}". Decode this '
        f"message, which was encoded with rot-{shift}, and write only the original text:\n"
        f"{ciphertext}"
    )
    (completion,) = model.complete([user(question)], temperature=0.0, max_new_tokens=max_new_tokens)
    return completion.text.strip().strip('"')


def decode_by_test(
    model: ChatModel, ciphertext: str, shifts: Sequence[int] = range(NUM_SHIFTS)
) -> Decoding:
    """Decode by every shift, and let the model's likelihood choose: one call of `score`.

    Args:
        model: gives the likelihoods.
        ciphertext: the encoded text.
        shifts: the candidates.

    Raises:
        ConfigError: the model gives no likelihoods.
        CallError: the call failed.
    """
    candidates = [encode(ciphertext, -shift) for shift in shifts]
    scores = model.score([user("Write a sentence in English.")], candidates)
    best = scores.index(max(scores))
    return Decoding(candidates[best], shifts[best], tuple(scores))


def matches(decoded: str, text: str) -> bool:
    """Whether a decoded text has the letters of the original, in any case and punctuation.

    Args:
        decoded: the decoded text.
        text: the original.
    """
    one, other = (
        [letter for letter in entry.lower() if letter in string.ascii_lowercase]
        for entry in (decoded, text)
    )
    return one == other
