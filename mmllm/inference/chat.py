"""Talking to a model from Python: a conversation in, a reply with text and media in order out.

chat = mmllm.load("mini")
reply = chat.reply("Draw a red apple.", seed=0)
reply.image.save("apple.png")
"""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from mmllm.conversation import Message
from mmllm.features.cache import FeatureCache
from mmllm.inference.cancel import CancelToken
from mmllm.inference.engine import Engine
from mmllm.inference.events import Done, Event, EventSink, OnStep, ignore, step_sink
from mmllm.inference.inputs import as_messages, with_system
from mmllm.inference.options import (
    ChatOptions,
    DecoderOptions,
    Modalities,
    SamplingOptions,
    pop_inputs,
)
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.replies import Reply
from mmllm.inference.requests import ReplyRequest
from mmllm.inference.session import ChatSession
from mmllm.inference.settings import resolve_settings
from mmllm.inference.streaming import iterate_events, iterate_events_async
from mmllm.inference.text_model import model_fingerprint, score_replies
from mmllm.model import AnyToAny
from mmllm.reasoning.verified import DEFAULT_TRIES, Verifier, verified_reply

if TYPE_CHECKING:
    from mmllm.reasoning.models import Completion


class Chat:
    """A model to talk to. Threads may share one: calls at the same time share the steps of the LLM
    and the batches of the decoders (mmllm.inference.engine).

    Attributes:
        model: the model, in evaluation mode.
        engine: what generates and renders for all calls.
    """

    def __init__(self, model: AnyToAny, *, prefixes: int = 0):
        """
        Args:
            model: the model.
            prefixes: how many conversations' key-value caches are kept, so that a later turn
                neither encodes nor prefills again what was there before. Replies then differ by
                rounding; with none kept the same call gives the same bytes.
        """
        self.model = model.eval()
        self.engine = Engine(model, PrefixCache(prefixes))
        self._features = FeatureCache(model, enabled=False)

    @classmethod
    def from_pretrained(cls, source: str = "mini", **options: Any) -> Chat:
        """Load a model: the name that transformers has for `mmllm.load`.

        Args:
            source: as for `mmllm.load`.
            options: as for `mmllm.load`.
        """
        from mmllm.inference.loading import load

        return load(source, **options)

    def __repr__(self) -> str:
        reads = ", ".join(["text", *self.model.renderer.input_keys])
        makes = ", ".join(["text", *self.model.renderer.output_keys])
        return f"Chat({self.model.config.name!r}, reads {reads}; makes {makes})"

    def reply(
        self,
        conversation: Any,
        *parts: Any,
        modalities: Modalities | None = None,
        seed: int | None = None,
        decoders: DecoderOptions | None = None,
        on_step: OnStep | None = None,
        cancel: threading.Event | None = None,
        verify: Verifier | str | None = None,
        tries: int = DEFAULT_TRIES,
        feedback: bool = False,
        think_first: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Reply:
        """Reply to one conversation.

        Args:
            conversation: a list of messages (`user(…)`, a Reply, OpenAI's dicts), one message, or
                the user's words and media: text, media, Paths, images of Pillow.
            *parts: more of the user's message: `chat.reply("What is this?", Image("cat.png"))`.
            modalities: auto, force or forbid by modality; or a list of what the reply may hold
                (`["text", "image"]`), or, without text in it, must hold (`["image"]`).
            seed: the same seed gives the same reply; drawn unless given, see `reply.seed`.
            decoders: by modality, options of its decoder; see `reply_many`.
            on_step: called with (output key, step, steps) while media are made.
            cancel: ends the work when it is set, from any thread.
            verify: checks the reply, which is made again with the next seed until it is accepted.
                A function of the reply that returns True, or what is wrong as text; "judge" (of the
                concepts of mini's data); "look-again" (the model must recognise what it made).
                `reply.verification` says how many tries it took, and why.
            tries: replies at most, with `verify`.
            feedback: whether a reply that was not accepted is sent back with what is wrong.
            think_first: whether the model first writes what it will make, as a turn of its own.
            **options: fields of mmllm.inference.sampling.Sampling (max_new_tokens, temperature, …),
                `system` for a system message's text, and media of the last message by modality:
                `image="cat.png"`.

        Raises:
            ConfigError: for an option that is unknown or out of range, with what is possible.
            MediaError: for a medium that cannot be read.
            ContextError: for a message that is longer than the model's context.
            Cancelled: after `cancel` was set.
        """
        sampling: dict[str, Any] = {**options}
        messages = as_messages(conversation, *parts, **pop_inputs(sampling))

        def answer(
            messages: Sequence[Message], seed: int | None, choices: Modalities | None = modalities
        ) -> Reply:
            return self._reply(
                [messages],
                seeds=None if seed is None else [seed],
                sink=self._sink(on_step),
                cancel=CancelToken(cancel),
                modalities=choices,
                decoders=decoders,
                sampling=sampling,
            )[0]

        if verify is None and not think_first:
            return answer(messages, seed)
        text_only: Modalities = dict.fromkeys(self.model.renderer.output_keys, "forbid")
        return verified_reply(
            answer,
            lambda messages, seed: answer(messages, seed, text_only),
            messages,
            seed=random.randrange(2**31) if seed is None else seed,
            verify=verify,
            tries=tries,
            feedback=feedback,
            think_first=think_first,
        )

    __call__ = reply

    async def areply(self, conversation: Any, *parts: Any, **options: Any) -> Reply:
        """Reply like `reply`, for asyncio: it computes in a thread.

        Cancelling the task ends the work.

        Args:
            conversation: as in `reply`.
            *parts: as in `reply`.
            **options: as in `reply`; `verify` may be a coroutine function.
        """
        cancel = options.setdefault("cancel", threading.Event())
        verify = options.get("verify")
        if inspect.iscoroutinefunction(verify):
            options["verify"] = _run_in(asyncio.get_running_loop(), verify)
        try:
            return await asyncio.to_thread(self.reply, conversation, *parts, **options)
        except asyncio.CancelledError:
            cancel.set()
            raise

    def conversation(self, *messages: Any, system: str | None = None) -> ChatSession:
        """A conversation that keeps its turns.

        Args:
            messages: those that it begins with.
            system: the text of a system message, which is put first.
        """
        first = as_messages(messages) if messages else []
        return ChatSession(self, first if system is None else with_system(first, system))

    def reply_many(
        self,
        conversations: Sequence[Any],
        *,
        modalities: Modalities | None = None,
        seeds: Sequence[int] | None = None,
        decoders: DecoderOptions | None = None,
        on_step: OnStep | None = None,
        cancel: threading.Event | None = None,
        render_media: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Reply]:
        """Reply to several conversations in one batch of the LLM and one batch of each decoder.

        With greedy decoding, equal conversations are generated once, as a single one is. The media
        of a seed then differ from those of `reply` only by the rounding of the decoder's batch.

        Args:
            conversations: each as `reply` takes it.
            modalities: as `reply` takes them.
            seeds: one for each conversation; the same seed gives the same reply.
            decoders: by modality, options of its decoder, as its `request_options` name them:
                steps, guidance, negative_prompt, scheduler, and for some cache, seconds, frames,
                fps, height, width, init_media, strength. With `init_media="last"` media start from
                the newest one in the conversation that the decoder can start from, if any.
                `mask`, `references`, `noise` and `keep` are for edits (docs/editing.md).
            on_step: called with (output key, step, steps), once for each step of a batch.
            cancel: ends the work when it is set, from any thread.
            render_media: if False, no decoder runs: the media of the replies have no data.
            **sampling: fields of mmllm.inference.sampling.Sampling.

        Raises:
            ConfigError, MediaError, ContextError, Cancelled: as `reply` does.
        """
        return self._reply(
            conversations,
            seeds=seeds,
            sink=self._sink(on_step),
            cancel=CancelToken(cancel),
            modalities=modalities,
            decoders=decoders,
            sampling=sampling,
            render_media=render_media,
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
        **options: Unpack[ChatOptions],
    ) -> Iterator[Event]:
        """Reply to one conversation by events (mmllm.inference.events).

        Media do not hold up the text, which goes on while they are made; decoders on a CPU work at
        the same time. Closing the iterator, or setting `cancel` from any thread, ends the work
        after the forward pass that is being computed (a batch of media goes on for other calls that
        wait for some of it); then there is no Done, and the engine holds nothing of the call.

        Args:
            conversation: as `reply` takes it.
            *parts: as `reply` takes them.
            modalities: as `reply` takes them.
            seed: the same seed gives the same reply, that of `reply`.
            decoders: by modality, options of its decoder; see `reply_many`.
            previews: whether Progress carries small images, at the cost of a few more passes of
                the decoder's VAE.
            cancel: ends the work when it is set, from any thread.
            **options: as `reply` takes them.

        Yields:
            Text, progress and media as they are made; the last event is Done, with the reply.

        Raises:
            ConfigError, MediaError, ContextError, Cancelled: as `reply` does.
        """
        sampling: dict[str, Any] = {**options}
        messages = as_messages(conversation, *parts, **pop_inputs(sampling))
        token = CancelToken(cancel)

        def work(put: Callable[[Event], None]) -> None:
            (reply,) = self._reply(
                [messages],
                seeds=None if seed is None else [seed],
                sink=lambda _, event: put(event),
                cancel=token,
                modalities=modalities,
                decoders=decoders,
                sampling=sampling,
                previews=previews,
            )
            put(Done(reply))

        yield from iterate_events(work, token)

    def astream(self, conversation: Any, *parts: Any, **options: Any) -> AsyncIterator[Event]:
        """Stream like `stream`, for asyncio: it computes in a thread.

        Closing the iterator ends the work.

        Args:
            conversation: as in `stream`.
            *parts: as in `stream`.
            **options: as in `stream`.
        """
        cancel = options.setdefault("cancel", threading.Event())

        def iterate() -> Iterator[Event]:
            return self.stream(conversation, *parts, **options)

        return iterate_events_async(iterate, cancel)

    def complete(
        self,
        conversation: Any,
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Completion]:
        """Sample `n` replies of text alone to one conversation, whose prompt is computed once.

        Replies have the seeds `seed`, `seed` + 1, … . With `score` this makes a chat a ChatModel
        (mmllm.reasoning.models). Errors are those of `reply`.
        """
        from mmllm.reasoning.models import Completion

        replies = self.reply_many(
            [as_messages(conversation)] * n,
            modalities=dict.fromkeys(self.model.renderer.output_keys, "forbid"),
            seeds=[seed + number for number in range(n)],
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        return [
            Completion(reply.text, 0 if number else reply.usage.prompt, reply.usage.text)
            for number, reply in enumerate(replies)
        ]

    def score(self, conversation: Any, replies: Sequence[str]) -> list[float]:
        """log p of each text as the whole reply, its end token included.

        Raises:
            ConfigError: there are no replies.
            MediaError: a medium cannot be read.
            ContextError: the conversation and a reply exceed the model's context.
        """
        return score_replies(self.model, self._features, as_messages(conversation), replies)

    def count_tokens(self, conversation: Any) -> int:
        """Tokens of a conversation as a prompt, media and the beginning of the reply included."""
        messages = as_messages(conversation)
        return len(self.model.renderer.render(messages, add_generation_prompt=True))

    @property
    def fingerprint(self) -> str:
        """A hash of the config and of all that was trained; equal ones give equal likelihoods."""
        return model_fingerprint(self.model)

    def _reply(
        self,
        conversations: Sequence[Any],
        *,
        sink: EventSink,
        cancel: CancelToken,
        **options: Any,
    ) -> list[Reply]:
        """Check the options (`resolve_settings`) and run one request."""
        began = time.perf_counter()
        messages = [as_messages(conversation) for conversation in conversations]
        settings = resolve_settings(
            self.model, messages, conditions=self.engine.conditions, **options
        )
        request = ReplyRequest(
            self.engine,
            self._features,
            messages,
            settings,
            sink=sink,
            cancel=cancel,
            began=began,
        )
        return request.run()

    def _sink(self, on_step: OnStep | None) -> EventSink:
        return step_sink(on_step, self.model.renderer.output_keys) if on_step else ignore


def _run_in(loop: asyncio.AbstractEventLoop, verify: Callable[[Any], Any]) -> Verifier:
    """A verifier that runs a coroutine function in an event loop, and waits in its own thread."""
    return lambda reply: asyncio.run_coroutine_threadsafe(verify(reply), loop).result()
