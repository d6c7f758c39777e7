"""One call of a chat, as a state machine.

    prefill ----------> text --------------------> media --------------> done
       prompts rendered    every sequence is done     every medium is made
       and prepared

`poll` makes the next transition that is possible, and computes nothing itself: it is called between
the engine's steps and whenever a medium is made. All that happens goes to one event sink; one
cancel token, which any thread may set, ends the call.

Media of a single conversation are begun as soon as their signal span is generated, while the text
goes on; those of several conversations wait for the end of all texts, and are rendered in one batch
for each decoder.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from mmllm.conversation import MEDIA, Message, Text
from mmllm.data.protocol import FeatureProvider
from mmllm.data.rendering import Rendered
from mmllm.inference.cancel import CancelToken
from mmllm.inference.conditions import MARK
from mmllm.inference.engine import Engine
from mmllm.inference.events import EventSink, MediumReady
from mmllm.inference.media_queue import MediaRequest, MediaThreads, RenderedMedia
from mmllm.inference.outputs import Piece, SignalSpan
from mmllm.inference.prefill import Prefill, prepare_prefills
from mmllm.inference.prefix_cache import cache_keys
from mmllm.inference.replies import Reply, Timings, Usage
from mmllm.inference.sequence import SequenceState
from mmllm.inference.settings import RequestSettings
from mmllm.inference.text_stream import TextStream
from mmllm.version import __version__

_REPLY_RESERVE = 64
"""Tokens of the context that are kept for the reply, where it has twice as many."""

State = Literal["prefill", "text", "media", "done"]


@dataclass(frozen=True)
class PendingMedium:
    """One medium that is to be made.

    Attributes:
        conversation: whose reply it belongs to.
        piece_index: index of its signal span among the pieces, from which its noise is seeded.
        part_index: its part of the message.
        span: its signal span.
    """

    conversation: int
    piece_index: int
    part_index: int
    span: SignalSpan


class ReplyRequest:
    """Answers several conversations at once.

    Attributes:
        state: how far it is.
        streams: the message of each conversation as it grows.
    """

    def __init__(
        self,
        engine: Engine,
        features: FeatureProvider,
        conversations: Sequence[Sequence[Message]],
        settings: RequestSettings,
        *,
        sink: EventSink,
        cancel: CancelToken,
        began: float | None = None,
    ):
        """`began`: when the call came, by `time.perf_counter()`."""
        self.state: State = "prefill"
        self.settings = settings
        model = engine.model
        self.streams = [TextStream(model, settings.sampling.stop) for _ in conversations]
        self._engine, self._model, self._features = engine, model, features
        self._conversations = conversations
        self._sink, self._cancel = sink, cancel
        self._began = time.perf_counter() if began is None else began
        self._first_token_seconds = 0.0
        self._text_seconds = 0.0
        self._media_seconds: dict[str, float] = {}
        self._prompts: list[Rendered] = []
        self._notes: list[tuple[str, ...]] = []
        self._sequences: dict[SequenceState, list[int]] = {}
        """Sequence -> the conversations that it answers."""
        self._prefills: list[Prefill] = []
        self._pieces: deque[tuple[SequenceState, Piece]] = deque()
        """New pieces; whichever thread takes the engine's step appends to it."""
        self._batched: list[PendingMedium] = []
        """Media that wait for the end of all texts."""
        self._threads = MediaThreads(engine.render_media, model.decoders)
        self._rendering: dict[Future[RenderedMedia], tuple[str, list[PendingMedium]]] = {}

    @torch.inference_mode()
    def run(self) -> list[Reply]:
        """Answer, in the caller's thread; one reply for each conversation.

        Raises:
            MediaError: for a medium that cannot be read.
            ContextError: for a message that is longer than the context.
            Cancelled: soon after the token is cancelled.
        """
        with self._threads:
            try:
                self.poll()
                self._engine.generate(self._prefills, lambda: self.poll() != "text")
                while self.poll() != "done":
                    wait(self._rendering, return_when=FIRST_COMPLETED)
            except BaseException:
                self._cancel.cancel()  # ends the media that are being made
                raise
        return self._replies()

    def poll(self) -> State:
        """Make the next transition that is possible; the state after it. Raises Cancelled, and the
        error of what could not be generated or made."""
        self._cancel.check()
        if self.state == "prefill":
            self._prepare()
            self.state = "text"
        elif self.state == "text":
            # Asked first: the last pieces of a sequence are there before it is done.
            is_over = all(sequence.done for sequence in self._sequences)
            self._take_pieces()
            self._take_media()
            for sequence in self._sequences:
                if sequence.error:
                    raise sequence.error
            if is_over:
                self._end_text()
                self.state = "media"
        elif self.state == "media":
            self._take_media()
            if not self._rendering:
                self.state = "done"
        return self.state

    # --- prefill --------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Render the prompts, and make a sequence for each that is to be generated."""
        max_length = self._model.llm.max_length
        reserve = min(_REPLY_RESERVE, max_length // 2)
        for number, conversation in enumerate(self._conversations):
            prompt, num_dropped = self._model.renderer.fit(
                conversation, max_length, reserve=reserve
            )
            note = f"the context is full: the oldest {num_dropped} message(s) were left out"
            self._prompts.append(prompt)
            self._notes.append((note,) if num_dropped else ())
            for key in self.settings.impossible(number):
                self._note(number, key)
        sampling = self.settings.sampling
        for group in self._groups():
            first = group[0]
            num_left = max(max_length - len(self._prompts[first]), 1)
            forbidden = {
                self._model.decoders[key].modality: "forbid"
                for key in self.settings.impossible(first)
            }
            sequence = SequenceState(
                self._model,
                replace(
                    sampling,
                    max_new_tokens=min(sampling.max_new_tokens, num_left),
                    modalities={**sampling.modalities, **forbidden},
                ),
                torch.Generator().manual_seed(self.settings.seeds[first]),
                self._pieces,
            )
            self._sequences[sequence] = group
        self._prefills = prepare_prefills(
            self._model,
            [self._prompts[group[0]] for group in self._sequences.values()],
            self._features,
            list(self._sequences),
            self._engine.prefix_cache,
        )

    def _groups(self) -> list[list[int]]:
        """The conversations, those together that one sequence answers: equal prompts, if decoding
        is greedy."""
        if not self.settings.sampling.is_greedy or len(self._prompts) == 1:
            return [[number] for number in range(len(self._prompts))]
        groups: dict[tuple[Hashable, ...], list[int]] = {}
        for number, prompt in enumerate(self._prompts):
            groups.setdefault(tuple(cache_keys(prompt)), []).append(number)
        return list(groups.values())

    # --- text -----------------------------------------------------------------------------------

    def _take_pieces(self) -> None:
        """Emit the events of new pieces, and begin the media of a single conversation."""
        while self._pieces:
            sequence, piece = self._pieces.popleft()
            self._first_token_seconds = self._first_token_seconds or self._seconds()
            for conversation in self._sequences[sequence]:
                stream = self.streams[conversation]
                for event in stream.add(piece):
                    self._sink(conversation, event)
                if isinstance(piece, SignalSpan):
                    medium = PendingMedium(
                        conversation, stream.num_pieces - 1, len(stream.parts) - 1, piece
                    )
                    if len(self._conversations) == 1:
                        self._submit(piece.key, [medium])
                    else:
                        self._batched.append(medium)

    def _end_text(self) -> None:
        """Emit what was held back of the texts, and begin the media that waited for their end."""
        for conversation, stream in enumerate(self.streams):
            for event in stream.end():
                self._sink(conversation, event)
        self._text_seconds = self._seconds()
        batches: dict[tuple[str, Hashable], list[PendingMedium]] = {}
        for medium in self._batched:  # several for a decoder where only some start from a medium
            key = medium.span.key
            kind = self.settings.sources[medium.conversation, key].kind
            batches.setdefault((key, kind), []).append(medium)
        for (key, _), batch in batches.items():
            self._submit(key, batch)

    # --- media ----------------------------------------------------------------------------------

    def _submit(self, key: str, batch: list[PendingMedium]) -> None:
        """Begin to render media of one decoder."""
        modality = self._model.decoders[key].modality
        if not self.settings.render_media:
            for medium in batch:
                parts = self.streams[medium.conversation].parts
                parts[medium.part_index] = MEDIA[modality]()
            return
        request = MediaRequest(
            key,
            modality,
            torch.stack([medium.span.states for medium in batch]),
            captions=[self._caption(key, medium) for medium in batch],
            # A CPU's on every device (diffusers moves what it draws): the same noise everywhere.
            generators=[
                torch.Generator().manual_seed(self._noise_seed(key, medium)) for medium in batch
            ],
            sources=[self.settings.sources[medium.conversation, key] for medium in batch],
            options=self.settings.decoders.get(key, {}),
            owner=self,
            places=[(medium.conversation, medium.part_index) for medium in batch],
            sink=self._sink,
            cancel=self._cancel,
            previews=self.settings.previews,
        )
        self._rendering[self._threads.submit(request)] = key, batch

    def _noise_seed(self, key: str, medium: PendingMedium) -> int:
        """The seed of a medium's noise: that of an earlier medium, or a function of the reply's
        seed and the index of the signal span."""
        given = self.settings.sources[medium.conversation, key].noise_seed
        own = (self.settings.seeds[medium.conversation] * 65_537 + medium.piece_index) % 2**63
        return own if given is None else given

    def _caption(self, key: str, medium: PendingMedium) -> str:
        """What a medium is to show, in words: the text of the reply that stands nearest in front of
        it, or the last message, where there is none or the output projection asks for it."""
        request = self._conversations[medium.conversation][-1].text
        if self._model.output_projection(key).caption == "request":
            return request
        parts = self.streams[medium.conversation].parts[: medium.part_index]
        texts = [part.text.strip() for part in parts if isinstance(part, Text)]
        return next(filter(None, reversed(texts)), request)

    def _take_media(self) -> None:
        """Put media that are made into their messages. Raises the error of one that failed."""
        for future in [future for future in self._rendering if future.done()]:
            rendered = future.result()
            key, batch = self._rendering.pop(future)
            self._media_seconds[key] = self._media_seconds.get(key, 0.0) + rendered.seconds
            for row, (place, medium) in enumerate(zip(batch, rendered.media, strict=True)):
                condition = {name: value[row] for name, value in rendered.condition.items()}
                mark = self._engine.conditions.keep(key, condition)
                named = {} if mark is None else {MARK: mark}
                made = replace(medium, provenance=self._provenance(key, place) | named)
                self._note(place.conversation, key)
                self.streams[place.conversation].parts[place.part_index] = made
                self._sink(place.conversation, MediumReady(place.part_index, made))

    def _note(self, conversation: int, key: str) -> None:
        """Add what the caller should know of the sources of a decoder, once."""
        notes = self._notes[conversation]
        more = self.settings.sources[conversation, key].notes
        self._notes[conversation] = (*notes, *(note for note in more if note not in notes))

    def _provenance(self, key: str, place: PendingMedium) -> dict[str, Any]:
        return {
            "ai_generated": True,
            "software": f"mmllm {__version__}",
            "model": self._model.config.name,
            "decoder": key,
            "seed": self.settings.seeds[place.conversation],
            "noise_seed": self._noise_seed(key, place),
            **self.settings.sources[place.conversation, key].provenance,
        }

    # --- done -----------------------------------------------------------------------------------

    def _seconds(self) -> float:
        """Since the call came."""
        return time.perf_counter() - self._began

    def _replies(self) -> list[Reply]:
        timings = Timings(
            self._first_token_seconds or self._text_seconds,
            self._text_seconds,
            self._seconds(),
            self._media_seconds,
        )
        outputs = {
            conversation: sequence.output
            for sequence, conversations in self._sequences.items()
            for conversation in conversations
        }
        return [
            Reply(
                message=Message("assistant", tuple(stream.parts)),
                seed=self.settings.seeds[number],
                ids=outputs[number].ids,
                finish=outputs[number].finish,
                notes=self._notes[number],
                usage=Usage(
                    prompt=len(self._prompts[number]),
                    cached=outputs[number].num_cached,
                    text=len(outputs[number].ids),
                    signals=sum(
                        self._model.num_signal_tokens[span.key] for span in outputs[number].spans
                    ),
                ),
                timings=timings,
            )
            for number, stream in enumerate(self.streams)
        ]
