"""The objects that all routes share, and how a route has a reply made."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from mmllm.conversation import Medium, user
from mmllm.decoders.contract import Cancelled
from mmllm.errors import quoted
from mmllm.inference.chat import Chat
from mmllm.inference.events import Done, Event
from mmllm.inference.replies import Reply
from mmllm.server import encoding, errors
from mmllm.server.dispatcher import Dispatcher, ReplyJob, ReplyOptions
from mmllm.server.encoding import MediumEncoder
from mmllm.server.errors import CLOSED, ApiError, bad_request
from mmllm.server.generated_files import GeneratedFiles
from mmllm.server.metrics import Metrics
from mmllm.server.reply_options import OptionsParser
from mmllm.server.request_parsing import RequestParser
from mmllm.server.settings import MediaFormat, ServerSettings
from mmllm.server.videos import VideoJobs


class Service:
    """One model, the threads that answer for it, its jobs and its files."""

    def __init__(self, chat: Chat, settings: ServerSettings):
        self.settings = settings
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(chat, settings, self.metrics)
        self.files = GeneratedFiles(settings)
        self.options = OptionsParser(settings, chat)
        self.parser = RequestParser(settings, chat, self.files, self.options)
        self.videos = VideoJobs(self.dispatcher, settings)
        self.name = chat.model.config.name
        self.model_card = {
            "id": self.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "mmllm",
            "context": chat.model.llm.max_length,
            "reads": sorted(chat.model.renderer.input_keys),
            "makes": {
                modality: list(decoder.request_options)
                for modality, decoder in self.options.decoders.items()
            },
        }

    def check_model(self, name: str | None, ignored: list[str] | None = None) -> None:
        """Check the model that a request names.

        Args:
            name: None and the served model's own name are accepted.
            ignored: Where a lenient server notes that it dropped another name.

        Raises:
            ApiError: 404, the name of another model.
        """
        if name in (None, self.name):
            return
        if self.settings.lenient and ignored is not None:
            ignored.append("model")
            return
        raise ApiError(
            404,
            f"model {quoted(name)} is not served here; {self.name!r} is",
            param="model",
            code="model_not_found",
        )

    def file_urls(self, request: Request) -> Callable[[bytes, str], str]:
        """A function that keeps a file (bytes, suffix) and returns its URL, under the host name
        that the client used."""
        base = str(request.base_url).rstrip("/")
        return lambda data, suffix: base + self.files.add(data, suffix)

    def medium_encoder(
        self, request: Request, media_format: MediaFormat | None, audio_format: str = "wav"
    ) -> MediumEncoder:
        """What encodes the media of a response; without a `media_format`, as the server's settings
        have it."""
        media_format = media_format or self.settings.media_format
        return MediumEncoder(media_format, self.file_urls(request), audio_format)

    async def replies(self, request: Request, job: ReplyJob) -> list[Reply]:
        """Answer a job; it is cancelled when the client disconnects."""
        self.dispatcher.submit(job)
        try:
            return await unless_disconnected(request, asyncio.wrap_future(job.replies))
        except Cancelled as error:
            raise ApiError(503, "the server is shutting down", code="shutting_down") from error
        finally:
            self.dispatcher.cancel(job)

    async def generate_media(
        self,
        request: Request,
        prompt: str,
        options: ReplyOptions,
        seed: int | None,
        num: int = 1,
        sources: Sequence[Medium] = (),
    ) -> list[tuple[Medium, int]]:
        """Generate media of the one modality that `options` force.

        Args:
            request: Its disconnection cancels the work.
            prompt: The caption.
            options: As of `OptionsParser.single_medium`.
            seed: Of the first medium; the following ones count up. None draws one.
            num: How many.
            sources: Media that are shown before the prompt.

        Returns:
            The media, each with its seed.
        """
        self.options.check_text(prompt, "prompt")
        first = new_seed(num) if seed is None else seed
        if first + num > 2**63:
            raise bad_request(f"seed: too large to count up from for {num} pictures", "seed")
        job = ReplyJob([user(*sources, prompt)], options, first, num)
        replies = await self.replies(request, job)
        return [(reply.media[0], reply.seed) for reply in replies]

    async def events(self, request: Request, job: ReplyJob) -> AsyncIterator[Event]:
        """Start a job and return its events.

        An error before the first event is raised here, while the response can still be an error.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()

        def put(event: Event | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may end before the dispatcher
                loop.call_soon_threadsafe(queue.put_nowait, event)

        job.on_event = put
        job.replies.add_done_callback(lambda _: put(None))
        self.dispatcher.submit(job)
        try:
            first = await unless_disconnected(request, asyncio.ensure_future(queue.get()))
            if first is None:
                job.replies.result()
        except BaseException:
            self.dispatcher.cancel(job)
            raise

        async def events() -> AsyncIterator[Event]:
            event = first
            while event is not None:
                yield event
                event = await queue.get()
            yield Done(*job.replies.result())

        return events()

    def stream(
        self, job: ReplyJob, lines: AsyncIterator[str], ignored: Sequence[str]
    ) -> StreamingResponse:
        """A streamed response; the job is cancelled when it ends or nobody reads it any more."""
        headers = encoding.ignored_header(ignored)
        return _EventStream(lines, lambda: self.dispatcher.cancel(job), headers)


class _EventStream(StreamingResponse):
    """Server-sent events; `on_close` is called at their end, or when the client disconnects."""

    def __init__(
        self, lines: AsyncIterator[str], on_close: Callable[[], None], more: dict[str, str]
    ):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **more}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._on_close = on_close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def sse_lines(
    chunks: AsyncIterator[dict[str, Any]], *, named: bool = False
) -> AsyncIterator[str]:
    """Server-sent events of chunks. An error in their midst becomes an event.

    `named`: each chunk's `type` is also the event's name, and no `[DONE]` follows (the Responses
    API's form).
    """
    try:
        async for chunk in chunks:
            yield encoding.sse_event(chunk, chunk["type"] if named else None)
    except Cancelled:
        return
    except Exception as error:
        body = errors.to_api_error(error).body()
        if named:
            yield encoding.sse_event({"type": "error", **body["error"]}, "error")
        else:
            yield encoding.sse_event(body)
    if not named:
        yield encoding.sse_event("[DONE]")


def new_seed(reserve: int = 1) -> int:
    """A random seed, drawn as `Chat.reply` does; `reserve`: how many seeds are counted from it."""
    return random.randrange(2**31 - reserve)


async def unless_disconnected(request: Request, work: asyncio.Future[Any]) -> Any:
    """The result of `work`; it is cancelled when the client disconnects before.

    Raises:
        ApiError: 499, the client disconnected.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watching = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(CLOSED, "the client went away")
        return work.result()
    finally:
        work.cancel()
        watching.cancel()
