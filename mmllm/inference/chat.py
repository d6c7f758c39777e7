"""Talking to a model from Python: a conversation in, a reply with text and media in order out.

chat = mmllm.load("mini")
reply = chat.reply("Draw a red apple.", seed=0)
reply.image.save("apple.png")
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import queue
import random
import threading
import time
from collections import deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Unpack

import torch

from mmllm.conversation import Medium, Message
from mmllm.data.rendering import Rendered
from mmllm.decoders.contract import Cancelled
from mmllm.errors import ConfigError, quoted
from mmllm.features.cache import FeatureCache
from mmllm.inference.engine import Engine, MediaRequest
from mmllm.inference.events import Done, Event, MediumReady, Progress
from mmllm.inference.inputs import as_messages
from mmllm.inference.options import (
    DecoderOptions,
    Modalities,
    ModalityChoice,
    SamplingOptions,
    modality_choices,
    modality_key,
    sampling_options,
)
from mmllm.inference.outputs import Piece, SignalSpan
from mmllm.inference.prefill import prepare_prefill
from mmllm.inference.prefix_cache import PrefixCache, cache_keys
from mmllm.inference.replies import Reply, Timings, Usage
from mmllm.inference.sampling import Sampling
from mmllm.inference.sequence import SequenceState
from mmllm.inference.session import ChatSession
from mmllm.inference.text_stream import TextStream
from mmllm.model import AnyToAny
from mmllm.version import __version__

OnStep = Callable[[str, int, int], None]
"""Called with (output key, step, steps) while media are made, never twice at once."""
Emit = Callable[[int, Event], None]
"""Called with (row, event)."""

_SAMPLING = [field.name for field in dataclasses.fields(Sampling) if field.name != "modalities"]
_REPLY_ROOM = 64
"""Tokens that are always kept for a reply."""


class Chat:
    """A model and the way to ask it. Threads may share one: what they ask at the same time shares
    the steps of the LLM and the batches of the decoders (mmllm.inference.engine).

    `prefixes`: how many conversations' caches are kept, so that a later turn neither encodes nor
    prefills again what was there before (mmllm.inference.prefix_cache). What comes of it differs by
    rounding; with none kept the same request gives the same bytes.
    """

    def __init__(self, model: AnyToAny, *, prefixes: int = 0):
        self.model = model.eval()
        self.engine = Engine(model, PrefixCache(prefixes))
        self._work = FeatureCache(model, enabled=False)

    def reply(
        self,
        conversation: Any,
        *parts: Any,
        modalities: Modalities | None = None,
        seed: int | None = None,
        decoders: DecoderOptions | None = None,
        on_step: OnStep | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Reply:
        """The answer to one conversation.

        Args:
            conversation: a list of messages (`user(…)`, a Reply, OpenAI's dicts), one message, or
                what the user says: text, media, Paths, pictures of Pillow's.
            parts: more of what the user says: `chat.reply("What is this?", Image("cat.png"))`.
            modalities: auto, force or forbid by modality; or a list of what the reply may hold
                (`["text", "image"]`), or, without text in it, must hold (`["image"]`).
            seed: the same seed gives the same reply; drawn unless given, and told by `reply.seed`.
            decoders: by modality, options of its decoder; see `reply_many`.
            on_step: called with (output key, step, steps) while media are made.
            cancel: set from any thread, it ends the work.
            sampling: fields of mmllm.inference.sampling.Sampling (max_new_tokens, temperature, …).

        Raises:
            ConfigError: for what cannot be understood, with what is possible.
            MediaError: for a medium that cannot be read.
            ContextError: for a message that is longer than the model's context.
            Cancelled: after `cancel` was set.
        """
        return self._answer(
            [as_messages(conversation, *parts)],
            modalities=modalities,
            seeds=None if seed is None else [seed],
            decoders=decoders,
            sampling=sampling,
            on_step=on_step,
            stopped=(lambda: False) if cancel is None else cancel.is_set,
        )[0]

    __call__ = reply

    async def areply(self, conversation: Any, *parts: Any, **options: Any) -> Reply:
        """`reply` for asyncio: it computes in a thread. Cancelling the task ends the work."""
        cancel = options.setdefault("cancel", threading.Event())
        try:
            return await asyncio.to_thread(self.reply, conversation, *parts, **options)
        except asyncio.CancelledError:
            cancel.set()
            raise

    def conversation(self, *messages: Any) -> ChatSession:
        """A conversation that keeps its turns; it may begin with messages, `system("…")` say."""
        return ChatSession(self, as_messages(messages) if messages else [])

    def reply_many(
        self,
        conversations: Sequence[Any],
        *,
        modalities: Modalities | None = None,
        seeds: Sequence[int] | None = None,
        decoders: DecoderOptions | None = None,
        on_step: OnStep | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Reply]:
        """Answer several conversations in one LLM batch and one batch per decoder. Greedy words are
        a matter of the conversation: those that are the same are read and answered once, as one
        alone is, so that a seed's media differ from those that it gives alone by no more than the
        decoder's batches differ (a rounding, in its dtype).

        Each conversation is given as to `reply`, and so is `modalities`. `seeds`: one per
        conversation; the same seed gives the same reply. `decoders`: by modality, what the
        decoder's `request_options` name: steps, guidance, negative_prompt, scheduler, and for
        some cache, seconds, frames, fps, height, width, init_media, strength. With
        `init_media="last"` media start from the newest one in the conversation that the decoder
        can start from, if there is one. Other keywords: mmllm.inference.sampling.Sampling.
        `cancel`: set from any thread, it ends the work as it ends that of `stream`.
        Raises MediaError, ContextError and ConfigError, and Cancelled.
        """
        return self._answer(
            conversations,
            modalities=modalities,
            seeds=seeds,
            decoders=decoders,
            sampling=sampling,
            on_step=on_step,
            stopped=(lambda: False) if cancel is None else cancel.is_set,
        )

    def stream(
        self,
        conversation: Any,
        *parts: Any,
        modalities: Modalities | None = None,
        seed: int | None = None,
        decoders: DecoderOptions | None = None,
        previews: bool = False,
        cancel: threading.Event | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Event]:
        """Answer one conversation by events (mmllm.inference.events), the last of them Done with
        the reply that `reply` gives for the same arguments.

        The text is never held up by a medium: it goes on, saying where media will stand, while
        they are made; decoders on a CPU work side by side. `previews`: Progress then carries small
        pictures, at the cost of a few more passes of the codec.

        Closing the iterator, or setting `cancel` from any thread, ends the work after the forward
        pass that is being computed (a batch of media goes on for others who wait for some of it);
        then there is no Done, and nothing of it is left in the engine.
        Raises as `reply_many` does.
        """
        messages = as_messages(conversation, *parts)
        closed = threading.Event()
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                (reply,) = self._answer(
                    [messages],
                    modalities=modalities,
                    seeds=None if seed is None else [seed],
                    decoders=decoders,
                    sampling=sampling,
                    emit=lambda _, event: events.put(event),
                    previews=previews,
                    stopped=lambda: closed.is_set() or (cancel is not None and cancel.is_set()),
                )
                events.put(Done(reply))
            except Cancelled:
                pass
            except BaseException as error:
                events.put(error)
            finally:
                events.put(None)

        # A thread, because a pipeline cannot be left in the midst of its loop and taken up again.
        context = contextvars.copy_context()  # the caller's media.limits hold in it
        worker = threading.Thread(target=context.run, args=(work,), daemon=True)
        worker.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            closed.set()
            worker.join()

    async def astream(self, conversation: Any, *parts: Any, **options: Any) -> AsyncIterator[Event]:
        """`stream` for asyncio: it computes in a thread. Closing the iterator ends the work."""
        loop = asyncio.get_running_loop()
        cancel = options.setdefault("cancel", threading.Event())
        events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()

        def put(event: Event | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                for event in self.stream(conversation, *parts, **options):
                    put(event)
            except BaseException as error:
                put(error)
            finally:
                put(None)

        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(work,), daemon=True).start()
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            cancel.set()

    @torch.inference_mode()
    def _answer(
        self,
        conversations: Sequence[Any],
        *,
        modalities: Modalities | None,
        seeds: Sequence[int] | None,
        decoders: DecoderOptions | None,
        sampling: Mapping[str, Any],
        on_step: OnStep | None = None,
        emit: Emit | None = None,
        previews: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Reply]:
        """What all ways of asking share. Raises Cancelled soon after `stopped` says so."""
        began = time.perf_counter()
        choices = self._choices(modalities)
        options = self._options(choices, decoders or {})
        settings = Sampling(modalities=choices, **sampling_options(sampling, _SAMPLING))
        if seeds is None:
            seeds = [random.randrange(2**31) for _ in conversations]
        if len(seeds) != len(conversations):
            raise ConfigError(f"{len(conversations)} conversations but {len(seeds)} seeds")
        for seed in seeds:
            if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
                raise ConfigError(
                    f"seed: expected a whole number from 0 to 2**63 - 1, got {quoted(seed)}"
                )
        asked = [as_messages(entry) for entry in conversations]
        sources = self._sources(asked, options)
        request = RequestContext(options, sources, seeds, on_step, emit, previews, stopped, began)
        return self._serve(asked, settings, request)

    def _serve(
        self, conversations: Sequence[list[Message]], settings: Sampling, request: RequestContext
    ) -> list[Reply]:
        prompts, notes = [], []
        limit = self.model.llm.max_length
        for messages in conversations:
            prompt, dropped = self.model.renderer.fit(
                messages, limit, reserve=min(_REPLY_ROOM, limit // 2)
            )
            prompts.append(prompt)
            notes.append(
                (f"the context is full: the oldest {dropped} message(s) were left out",)
                if dropped
                else ()
            )
        shared = _alike(prompts) if settings.is_greedy else [[row] for row in range(len(prompts))]
        writers = [TextStream(self.model, settings.stop) for _ in prompts]
        # Filled by the thread that works for all.
        pieces: deque[tuple[SequenceState, Piece]] = deque()
        rows = []
        for alike in shared:
            room = max(limit - len(prompts[alike[0]]), 1)
            rows.append(
                SequenceState(
                    self.model,
                    replace(settings, max_new_tokens=min(settings.max_new_tokens, room)),
                    torch.Generator().manual_seed(request.seeds[alike[0]]),
                    pieces,
                )
            )
        answered = dict(zip(rows, shared, strict=True))
        batched_spans: list[PendingMedium] = []
        in_flight: list[tuple[str, Future[float]]] = []
        with contextlib.ExitStack() as stack:
            makers = {  # a thread each, if there is something to make; of one decoder in order
                key: stack.enter_context(ThreadPoolExecutor(1)) for key in self.model.decoders
            }

            def make(key: str, runs: Sequence[PendingMedium]) -> None:
                in_flight.append((key, makers[key].submit(self._make, key, runs, writers, request)))

            def poll() -> None:
                _check(request.stopped)
                while pieces:
                    sequence, piece = pieces.popleft()
                    request.first_token = request.first_token or request.seconds()
                    for row in answered[sequence]:
                        writer = writers[row]
                        for event in writer.add(piece):
                            request.tell(row, event)
                        if not isinstance(piece, SignalSpan):
                            continue
                        place = len(writer.parts) - 1
                        run = PendingMedium(row, writer.num_pieces - 1, place, piece)
                        if len(prompts) == 1:
                            make(piece.key, [run])
                        else:  # several rows wait for one another, for a batch of all
                            batched_spans.append(run)

            try:
                asked = [prompts[alike[0]] for alike in shared]
                entry = prepare_prefill(
                    self.model, asked, self._work, rows, self.engine.prefix_cache
                )
                self.engine.generate(entry, poll)
                for row, writer in enumerate(writers):
                    for event in writer.end():
                        request.tell(row, event)
                text = request.seconds()
                for key, runs in request.batches(batched_spans):
                    make(key, runs)
                media: dict[str, float] = {}
                for key, made in in_flight:
                    media[key] = media.get(key, 0.0) + made.result()
            except BaseException:
                request.stopped = lambda: True
                raise
        by_row = {
            number: row.output for row, alike in zip(rows, shared, strict=True) for number in alike
        }
        answers = [by_row[number] for number in range(len(prompts))]
        timings = Timings(request.first_token or text, text, request.seconds(), media)
        return [
            Reply(
                message=Message("assistant", tuple(writer.parts)),
                seed=request.seeds[row],
                ids=answer.ids,
                finish=answer.finish,
                notes=notes[row],
                usage=Usage(
                    prompt=len(prompts[row]),
                    cached=answer.num_cached,
                    text=len(answer.ids),
                    signals=sum(len(run.states) for run in answer.spans),
                ),
                timings=timings,
            )
            for row, (answer, writer) in enumerate(zip(answers, writers, strict=True))
        ]

    @torch.inference_mode()
    def _make(
        self,
        key: str,
        runs: Sequence[PendingMedium],
        writers: Sequence[TextStream],
        request: RequestContext,
    ) -> float:
        """Fill the writers' parts with the media of one batch of `request.batches`; its seconds."""
        _check(request.stopped)
        began = time.perf_counter()
        rows = [(entry.row, entry.place) for entry in runs]
        sources = [request.sources[row, key] for row, _ in rows if (row, key) in request.sources]
        order = MediaRequest(
            key,
            torch.stack([entry.run.states for entry in runs]),
            generators=[_noise(request.seeds[entry.row], entry.number) for entry in runs],
            sources=sources or None,
            options=request.options.get(key, {}),
            owner=request,
            **request.watch(key, self.model.decoders[key].modality, rows),
        )
        media = self.engine.render_media(order, lambda: _check(request.stopped))
        for (row, place), medium in zip(rows, media, strict=True):
            made = replace(medium, provenance=self._provenance(key, request.seeds[row]))
            writers[row].parts[place] = made
            request.tell(row, MediumReady(place, made))
        return time.perf_counter() - began

    def _sources(
        self, conversations: Sequence[list[Message]], options: Mapping[str, Mapping[str, Any]]
    ) -> dict[tuple[int, str], Medium]:
        """What media of each row and output key start from, where they start from a medium."""
        found = {}
        for key, decoder in self.model.decoders.items():
            if not decoder.init_modality:
                continue
            if decoder.with_overrides(**options.get(key, {})).config.init_media != "last":
                continue
            for row, messages in enumerate(conversations):
                media = [medium for message in messages for medium in message.media]
                for medium in media:  # the newest stays
                    if medium.modality == decoder.init_modality:
                        found[row, key] = medium
        return found

    def _choices(self, modalities: Modalities | None) -> dict[str, ModalityChoice]:
        """A list that leaves out what the model cannot make anyway says nothing of it."""
        choices = modality_choices(modalities)
        if isinstance(modalities, Mapping):
            return choices
        keys = self.model.renderer.output_keys
        return {
            name: choice for name, choice in choices.items() if choice != "forbid" or name in keys
        }

    def _options(
        self, modalities: Mapping[str, ModalityChoice], decoders: DecoderOptions
    ) -> dict[str, dict[str, Any]]:
        """Output key -> what `sample` is called with, checked before anything is computed."""
        decoders = {modality_key(name): given for name, given in decoders.items()}
        keys = self.model.renderer.output_keys
        for modality in {**modalities, **decoders}:
            if modality not in keys:
                raise ConfigError(
                    f"unknown modality {modality!r}; this model makes "
                    f"{', '.join(sorted(keys)) or 'text only'}"
                )
        options = {keys[modality]: dict(given) for modality, given in decoders.items()}
        for key, given in options.items():
            self.model.decoders[key].with_overrides(**given)
        return options

    def _provenance(self, key: str, seed: int) -> dict[str, Any]:
        return {
            "ai_generated": True,
            "software": f"mmllm {__version__}",
            "model": self.model.config.name,
            "decoder": key,
            "seed": seed,
        }


def _noise(seed: int, place: int) -> torch.Generator:
    """The generator of one medium: a function of the reply's seed and the medium's place in it. It
    is the CPU's on every device (diffusers moves what it draws): the same noise everywhere."""
    return torch.Generator().manual_seed((seed * 65_537 + place) % 2**63)


def _alike(prompts: Sequence[Rendered]) -> list[list[int]]:
    """The numbers of the prompts, those together that say and show the same."""
    if len(prompts) == 1:
        return [[0]]
    found: dict[tuple[Hashable, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        found.setdefault(tuple(cache_keys(prompt)), []).append(number)
    return list(found.values())


def _check(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise Cancelled


@dataclass(frozen=True)
class PendingMedium:
    """One medium to be made: part `place` of a row's message, of a run that is piece `number` of
    the row's answer."""

    row: int
    number: int
    place: int
    run: SignalSpan


@dataclass
class RequestContext:
    """What one call of the engine carries along."""

    options: Mapping[str, Mapping[str, Any]]
    sources: Mapping[tuple[int, str], Medium]
    seeds: Sequence[int]
    on_step: OnStep | None
    emit: Emit | None
    previews: bool
    stopped: Callable[[], bool]
    began: float
    first_token: float = 0.0
    _telling: threading.Lock = field(default_factory=threading.Lock)

    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self.began

    def tell(self, row: int, event: Event) -> None:
        if self.emit:
            self.emit(row, event)

    def batches(self, runs: Iterable[PendingMedium]) -> list[tuple[str, list[PendingMedium]]]:
        """One per decoder; two, where only some media have a source."""
        found: dict[tuple[str, bool], list[PendingMedium]] = {}
        for entry in runs:
            key = entry.run.key
            found.setdefault((key, (entry.row, key) in self.sources), []).append(entry)
        return [(key, batch) for (key, _), batch in found.items()]

    def watch(self, key: str, modality: str, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The callbacks of `sample` for the media at `places`: (row, part of the message)."""
        shown: list[Any] = [None] * len(places)

        def on_preview(pictures: list[Medium]) -> None:
            shown[:] = pictures

        def on_step(step: int, steps: int) -> None:
            _check(self.stopped)
            if self.on_step:
                with self._telling:
                    self.on_step(key, step, steps)
            for index, (row, place) in enumerate(places):
                self.tell(row, Progress(place, modality, step, steps, shown[index]))
                shown[index] = None

        return {"on_step": on_step, "on_preview": on_preview if self.previews else None}
