"""Pieces of a sequence -> the parts of a message, and events for what is certain of its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mmllm.conversation import ContentPart, Text
from mmllm.inference.events import Event, MediumStarted, TextDelta
from mmllm.inference.outputs import Piece, SignalSpan, decode_text
from mmllm.model import AnyToAny


class TextStream:
    """The message of one sequence as it grows.

    Attributes:
        parts: text and media in order; an empty Text stands where a medium will be.
        num_pieces: how many pieces were added.
    """

    def __init__(self, model: AnyToAny, stop: Sequence[str]):
        """`stop`: strings before the first of which the text ends."""
        self.parts: list[ContentPart] = []
        self.num_pieces = 0
        self._model = model
        self._stop = stop
        self._ids: list[int] = []
        self._num_emitted = 0
        """Characters of the last text part that were emitted."""

    def add(self, piece: Piece) -> Iterator[Event]:
        """Add one piece; yields the events that it causes."""
        self.num_pieces += 1
        if isinstance(piece, SignalSpan):
            yield from self.end()
            modality = self._model.decoders[piece.key].modality
            self.parts.append(Text(""))
            yield MediumStarted(len(self.parts) - 1, modality)
            return
        if not self._ids:
            self.parts.append(Text(""))
        self._ids.append(piece)
        yield from self._emit(self._certain_length)

    def end(self) -> Iterator[Event]:
        """End the text part, if there is one; yields what was held back of it."""
        if self._ids:
            yield from self._emit(len)
        self._ids, self._num_emitted = [], 0

    def _emit(self, certain_length: Callable[[str], int]) -> Iterator[Event]:
        """Decode the text part anew, and emit what is new up to `certain_length` of it."""
        text = decode_text(self._model.llm.tokenizer, self._ids)
        text = text[: min([len(text), *(text.find(s) for s in self._stop if s in text)])]
        self.parts[-1] = Text(text)
        if (end := certain_length(text)) > self._num_emitted:
            yield TextDelta(len(self.parts) - 1, text[self._num_emitted : end])
            self._num_emitted = end

    def _certain_length(self, text: str) -> int:
        """How many characters of a growing text will stay: without the replacement characters of an
        incomplete one at the end, and without the beginning of a stop string."""
        text = text.rstrip("\ufffd")
        partial_stops = [
            length
            for stop in self._stop
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        return len(text) - max(partial_stops, default=0)
