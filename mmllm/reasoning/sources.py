"""What a tree is built over: a text, a long clip or a long sound, in segments that a model can be
shown one at a time.

Legend: F frames, H x W pixels, S samples, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol, TypeAlias

import numpy as np

from mmllm.conversation import Audio, Message, Video, user
from mmllm.errors import ConfigError, quoted
from mmllm.reasoning.models import ChatModel
from mmllm.utils.hashing import sha256


class Source(Protocol):
    """A long text, clip or sound."""

    @property
    def kind(self) -> str:
        """text, video or audio."""
        ...

    @property
    def prompt(self) -> str:
        """What a model is asked, to say what is in a segment."""
        ...

    @property
    def digest(self) -> str:
        """A hash of the content and of how it is cut."""
        ...

    def __len__(self) -> int:
        """Characters, frames or samples."""
        ...

    def segments(self, model: ChatModel, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Start and end of each segment.

        Args:
            model: counts the tokens of a text.
            num_tokens: tokens of a segment of a text, at most.
        """
        ...

    def message(self, start: int, end: int, before: str = "", after: str = "") -> Message:
        """A user message that shows a part.

        Args:
            start: where the part begins.
            end: where it ends.
            before: the words before it.
            after: the words behind it.
        """
        ...

    def place(self, start: int, end: int) -> str:
        """Where a part lies, in words.

        Args:
            start: where the part begins.
            end: where it ends.
        """
        ...


@dataclass(frozen=True)
class LongText:
    """A text, cut at paragraphs where possible, else at sentences, else at words."""

    text: str
    kind = "text"
    prompt = "Summarize the above text comprehensively into a fluent passage."

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ConfigError("the text is empty: there is nothing to read")

    @property
    def digest(self) -> str:
        """See Source."""
        return sha256(self.text)

    def __len__(self) -> int:
        return len(self.text)

    def segments(self, model: ChatModel, num_tokens: int) -> Iterator[tuple[int, int]]:
        """See Source."""
        return split_text(model, self.text, num_tokens)

    def message(self, start: int, end: int, before: str = "", after: str = "") -> Message:
        """See Source."""
        return user(f"{before}{self.text[start:end].strip()}{after}".strip())

    def place(self, start: int, end: int) -> str:
        """See Source."""
        return f"characters {start}-{end}"


@dataclass(frozen=True, eq=False)
class LongMedium:
    """A long clip or sound, cut into equal parts.

    Attributes:
        medium: the clip or sound.
        seconds: length of a segment; the last one may be shorter.
    """

    medium: Video | Audio
    seconds: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.medium, (Video, Audio)):
            raise ConfigError(
                f"expected a text, a Video or an Audio to read, got {quoted(self.medium)}"
            )
        if not self.seconds > 0:
            raise ConfigError(f"seconds: expected more than 0, got {self.seconds}")

    @property
    def kind(self) -> str:
        """See Source."""
        return self.medium.modality

    @property
    def prompt(self) -> str:
        """See Source."""
        return "What do you see?" if isinstance(self.medium, Video) else "What do you hear?"

    @property
    def digest(self) -> str:
        """See Source."""
        return sha256(f"{self._rate} {self.seconds} {sha256(self._array.tobytes())}")

    def __len__(self) -> int:
        return self._array.shape[self._axis]

    def segments(self, model: ChatModel, num_tokens: int) -> Iterator[tuple[int, int]]:
        """See Source."""
        num = max(round(len(self) / (self.seconds * self._rate)), 1)
        bounds = [round(number * len(self) / num) for number in range(num + 1)]
        yield from pairwise(bounds)

    def message(self, start: int, end: int, before: str = "", after: str = "") -> Message:
        """See Source."""
        if isinstance(self.medium, Video):
            part = Video.from_numpy(self._array[start:end], self._rate)
        else:
            part = Audio.from_numpy(self._array[:, start:end], round(self._rate))
        return user(*[shown for shown in (before.strip(), part, after.strip()) if shown != ""])

    def place(self, start: int, end: int) -> str:
        """See Source."""
        return f"{start / self._rate:.1f} s to {end / self._rate:.1f} s"

    @property
    def _axis(self) -> int:
        return 0 if isinstance(self.medium, Video) else 1

    @cached_property
    def _content(self) -> tuple[np.ndarray, float]:
        """uint8[F, H, W, 3] or float32[C, S], and frames or samples per second."""
        content = self.medium.content()
        rate = content.fps or content.sample_rate
        assert rate
        return content.array, rate

    @property
    def _array(self) -> np.ndarray:
        return self._content[0]

    @property
    def _rate(self) -> float:
        return self._content[1]


Readable: TypeAlias = str | Video | Audio | Source
"""What `build_tree` takes; a medium alone is cut as LongMedium does."""


def as_source(given: Readable) -> Source:
    """The source for a text or a medium. Raises ConfigError for anything else, and for an empty
    text."""
    if isinstance(given, str):
        return LongText(given)
    if isinstance(given, (Video, Audio)):
        return LongMedium(given)
    if hasattr(given, "segments"):
        return given
    raise ConfigError(f"expected a text, a Video or an Audio to read, got {quoted(given)}")


def split_text(model: ChatModel, text: str, num_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut a text into segments, at paragraphs where possible, else at sentences, else at words.

    Args:
        model: counts tokens.
        text: the text.
        num_tokens: tokens of a segment, at most.

    Yields:
        Start and end of each segment, in characters.
    """
    overhead = model.count_tokens([user("")])
    start = end = count = 0
    for piece_end, piece_count in _pieces(model, text, num_tokens, overhead):
        if count and count + piece_count > num_tokens:
            yield start, end
            start, count = end, 0
        end, count = piece_end, count + piece_count
    if text[start:end].strip():
        yield start, end


_CUTS = (re.compile(r"\n\s*\n+"), re.compile(r"(?<=[.!?])\s+"), re.compile(r"\s+"))


def _pieces(
    model: ChatModel, text: str, num_tokens: int, overhead: int, start: int = 0, depth: int = 0
) -> Iterator[tuple[int, int]]:
    """(end in characters, tokens) of the pieces of a text that begins at `start`, in order."""
    place = 0
    ends = [match.end() for match in _CUTS[depth].finditer(text)] if depth < len(_CUTS) else []
    for end in [*ends, len(text)]:
        piece = text[place:end]
        count = max(model.count_tokens([user(piece)]) - overhead, 1) if piece else 0
        if count > num_tokens and depth + 1 < len(_CUTS):
            yield from _pieces(model, piece, num_tokens, overhead, start + place, depth + 1)
        elif piece:
            yield start + end, count
        place = end
