"""The routes: read a request, ask the engine, write the answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

import mmllm
from mmllm.chat import Chat
from mmllm.conversation import Medium, user
from mmllm.decoders.contract import Cancelled
from mmllm.errors import quoted
from mmllm.media import isolated
from mmllm.replies import Done, Event, Reply
from mmllm.server import bodies, errors, generated_files, pages, responses
from mmllm.server import schemas as api
from mmllm.server.dispatcher import Dispatcher, ReplyJob, ReplyOptions
from mmllm.server.errors import CLOSED, ApiError, bad_request
from mmllm.server.generated_files import GeneratedFiles
from mmllm.server.metrics import Metrics
from mmllm.server.middleware import AdmissionMiddleware
from mmllm.server.request_parsing import RequestParser
from mmllm.server.settings import ServerSettings
from mmllm.server.videos import VideoJob, VideoJobs

_TOLD = {
    400: "The request cannot be meant.",
    401: "The token is missing or wrong.",
    403: "The server does not answer to this name.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests.",
    500: "The server's fault; its log says why.",
    503: "The server is shutting down.",
}


_OF_FILES = {
    "cache-control": "private, max-age=3600",
    "content-security-policy": "default-src 'none'; sandbox",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "cross-origin",
}


def build_app(chat: Chat, settings: ServerSettings | None = None) -> FastAPI:
    """The server of one model, as an ASGI application."""
    service = Service(chat, settings or ServerSettings())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.dispatcher.start()
        await asyncio.to_thread(isolated.start)
        try:
            yield
        finally:
            service.videos.close()
            await asyncio.to_thread(service.dispatcher.close)

    app = FastAPI(
        title="mmllm",
        summary="Text, pictures, sounds and clips in; text, pictures, sounds and clips out.",
        version=mmllm.__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        responses={
            status: {"model": errors.ErrorResponse, "description": text}
            for status, text in _TOLD.items()
        },
    )
    app.state.service = service
    errors.install(app)
    _document(app, settings or ServerSettings())

    app.add_middleware(AdmissionMiddleware, settings=service.settings, metrics=service.metrics)  # pyright: ignore
    if service.settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(service.settings.allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-mmllm-seed", "x-mmllm-ignored"],
        )
    _add_routes(app, service)
    return app


class Service:
    """What the routes share: one model, its engine, and its jobs."""

    def __init__(self, chat: Chat, settings: ServerSettings):
        self.settings = settings
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(chat, settings, self.metrics)
        self.files = GeneratedFiles(settings)
        self.parser = RequestParser(settings, chat, self.files)
        self.videos = VideoJobs(self.dispatcher, settings)
        self.name = chat.model.config.name
        self.card = {
            "id": self.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "mmllm",
            "context": chat.model.llm.max_length,
            "reads": sorted(chat.model.renderer.input_keys),
            "makes": {
                modality: list(decoder.request_options)
                for modality, decoder in self.parser.decoders.items()
            },
        }

    def check_model(self, name: str | None, ignored: list[str] | None = None) -> None:
        """The name that a request may bear; a lenient server adds another to `ignored`."""
        if name not in (None, self.name):
            if self.settings.lenient and ignored is not None:
                ignored.append("model")
                return
            raise ApiError(
                404,
                f"model {quoted(name)} is not served here; {self.name!r} is",
                param="model",
                code="model_not_found",
            )

    def keeper(self, request: Request) -> Callable[[bytes, str], str]:
        """Keeps a file (its bytes, its suffix) and returns its URL, by the name that the client
        calls the server by."""
        base = str(request.base_url).rstrip("/")
        return lambda data, suffix: base + self.files.add(data, suffix)

    async def replies(self, request: Request, job: ReplyJob) -> list[Reply]:
        """Have a job answered; it is cancelled when the client goes away."""
        self.dispatcher.submit(job)
        try:
            return await unless_gone(request, asyncio.wrap_future(job.replies))
        except Cancelled as error:
            raise ApiError(503, "the server is shutting down", code="shutting_down") from error
        finally:
            self.dispatcher.cancel(job)

    async def make(
        self,
        request: Request,
        prompt: str,
        options: ReplyOptions,
        seed: int | None,
        num: int = 1,
        source: Medium | None = None,
    ) -> list[tuple[Medium, int]]:
        """`num` media of the one modality that `options` force, each with its seed."""
        self.parser.check_text(prompt, "prompt")
        first = new_seed(num) if seed is None else seed
        if first + num > 2**63:
            raise bad_request(f"seed: too large to count on from for {num} pictures", "seed")
        said = user(prompt) if source is None else user(source, prompt)
        replies = await self.replies(request, ReplyJob([said], options, first, num))
        return [(reply.media[0], reply.seed) for reply in replies]

    async def events(self, request: Request, job: ReplyJob) -> AsyncIterator[Event]:
        """Start a job and return its events. What is wrong before the first is raised here, when
        the response can still be an error."""
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended before the engine
                loop.call_soon_threadsafe(told.put_nowait, event)

        job.on_event = tell
        job.replies.add_done_callback(lambda _: tell(None))
        self.dispatcher.submit(job)
        try:
            first = await unless_gone(request, asyncio.ensure_future(told.get()))
            if first is None:
                job.replies.result()
        except BaseException:
            self.dispatcher.cancel(job)
            raise

        async def rest() -> AsyncIterator[Event]:
            event = first
            while event is not None:
                yield event
                event = await told.get()
            yield Done(*job.replies.result())

        return rest()


class EventStream(StreamingResponse):
    """A streamed answer; `closed` is called when it ended, or nobody reads it any more."""

    def __init__(self, lines: AsyncIterator[str], closed: Callable[[], None], more: dict[str, str]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **more}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._closed = closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closed()


def _add_routes(app: FastAPI, service: Service) -> None:
    stream_too = {"content": {"text/event-stream": {}}, "description": "The answer, or chunks."}

    @app.post(
        "/v1/chat/completions",
        responses={200: stream_too},
        response_model=api.ChatResponse,
        openapi_extra=bodies.documented(api.ChatRequest),
    )
    async def chat_completions(
        request: Request, body: Annotated[api.ChatRequest, Depends(bodies.read(api.ChatRequest))]
    ) -> Response:
        """Answer a conversation with text and media."""
        service.check_model(body.model, body.ignored)
        options = await asyncio.to_thread(service.parser.chat_options, body)
        reading = service.parser.conversation(body.messages, options)
        conversation = await unless_gone(request, asyncio.ensure_future(reading))
        seed = new_seed() if body.seed is None else body.seed
        job = ReplyJob(conversation, options, seed)
        writer = responses.ChatResponseWriter(
            service.name,
            body.audio.format if body.audio else "wav",
            (body.mmllm and body.mmllm.media) or service.settings.media_format,
            service.keeper(request),
            body.ignored,
        )
        headers = responses.headers(body.ignored)
        if not body.stream:
            (reply,) = await service.replies(request, job)
            return JSONResponse(await writer.whole(reply), headers=headers)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = writer.chunks(await service.events(request, job), with_usage=with_usage)
        return EventStream(_lines(chunks), lambda: service.dispatcher.cancel(job), headers)

    @app.post(
        "/v1/images/generations",
        response_model=api.ImageResponse,
        openapi_extra=bodies.documented(api.ImageRequest),
    )
    async def images(
        request: Request, body: Annotated[api.ImageRequest, Depends(bodies.read(api.ImageRequest))]
    ) -> Response:
        """Make pictures of a prompt."""
        service.check_model(body.model, body.ignored)
        options = await asyncio.to_thread(
            service.parser.single_medium_options,
            "image",
            body.decoder,
            size=body.size,
            ignored=body.ignored,
        )
        made = await service.make(request, body.prompt, options, body.seed, body.n or 1)
        kind = body.output_format or "png"
        return await pictures(request, made, kind, body.response_format, body.ignored)

    @app.post(
        "/v1/images/edits",
        response_model=api.ImageResponse,
        openapi_extra=bodies.documented_edit(),
    )
    async def edits(
        request: Request,
        sent: Annotated[tuple[api.EditRequest, bytes], Depends(bodies.read_edit)],
    ) -> Response:
        """Make pictures that start from one, sent in a form with the prompt."""
        body, file = sent
        service.check_model(body.model, body.ignored)
        options = await asyncio.to_thread(service.parser.edit_options, body)
        reading = service.parser.picture(file, "image")
        source = await unless_gone(request, asyncio.ensure_future(reading))
        made = await service.make(
            request, body.prompt, options, body.seed, body.n or 1, source=source
        )
        kind = body.output_format or "png"
        return await pictures(request, made, kind, body.response_format, body.ignored)

    async def pictures(
        request: Request,
        made: list[tuple[Medium, int]],
        kind: str,
        how: str | None,
        ignored: list[str],
    ) -> Response:
        keep = service.keeper(request)
        data: list[dict[str, Any]] = []
        for picture, seed in made:
            file = await responses.encode_medium(picture, kind)
            if how == "url":
                data.append({"url": keep(file, kind), "seed": seed})
            else:
                data.append({"b64_json": base64.b64encode(file).decode("ascii"), "seed": seed})
        more = {"mmllm": responses.ignored_fields(ignored)} if ignored else {}
        return JSONResponse(
            {"created": int(time.time()), "data": data, "output_format": kind, **more},
            headers=responses.headers(ignored),
        )

    sounds = {"content": {responses.TYPES[name]: {} for name in ("wav", "flac", "mp3")}}

    @app.post(
        "/v1/audio/speech",
        response_class=Response,
        responses={200: {**sounds, "description": "The sound."}},
        openapi_extra=bodies.documented(api.SpeechRequest),
    )
    async def speech(
        request: Request,
        body: Annotated[api.SpeechRequest, Depends(bodies.read(api.SpeechRequest))],
    ) -> Response:
        """Make a sound of a description."""
        service.check_model(body.model, body.ignored)
        options = await asyncio.to_thread(
            service.parser.single_medium_options, "audio", body.decoder
        )
        ((sound, seed),) = await service.make(request, body.input, options, body.seed)
        kind = body.response_format or "wav"
        return Response(
            await responses.encode_medium(sound, kind),
            media_type=responses.TYPES[kind],
            headers=responses.headers(body.ignored, **{"x-mmllm-seed": str(seed)}),
        )

    @app.post(
        "/v1/videos",
        response_model=api.VideoResponse,
        openapi_extra=bodies.documented(api.VideoRequest),
    )
    async def create_video(
        body: Annotated[api.VideoRequest, Depends(bodies.read(api.VideoRequest))],
    ) -> Response:
        """Begin to make a clip of a prompt."""
        service.check_model(body.model, body.ignored)
        service.parser.check_text(body.prompt, "prompt")
        options = await asyncio.to_thread(
            service.parser.single_medium_options,
            "video",
            body.decoder,
            size=body.size,
            seconds=body.seconds,
            ignored=body.ignored,
        )
        seed = new_seed() if body.seed is None else body.seed
        clip = service.videos.create(ReplyJob([user(body.prompt)], options, seed), body.prompt)
        return described(clip, responses.headers(body.ignored))

    def described(clip: VideoJob, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse(service.videos.describe(clip, service.name), headers=headers)

    @app.get("/v1/videos/{video_id}", response_model=api.VideoResponse)
    async def video(video_id: str) -> Response:
        """How far a clip is."""
        return described(service.videos.get(video_id))

    @app.delete("/v1/videos/{video_id}", response_model=api.VideoDeleted)
    async def delete_video(video_id: str) -> dict[str, Any]:
        """Forget a clip; one that is being made is stopped."""
        service.videos.delete(video_id)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    clips = {"content": {"video/mp4": {}}, "description": "The clip."}
    early = {"model": errors.ErrorResponse, "description": "The clip is not ready."}

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=Response,
        responses={200: clips, 409: early},
    )
    async def video_content(video_id: str) -> Response:
        """The file of a clip that is ready."""
        clip = service.videos.get(video_id)
        if clip.error is not None:
            raise replaced(clip.error, 409)
        if clip.completed is None:
            raise ApiError(
                409, f"the clip is {clip.status}; ask again when it is completed", code="not_ready"
            )
        return Response(clip.data, media_type="video/mp4")

    @app.head(generated_files.PATH + "{name}", include_in_schema=False)
    @app.get(
        generated_files.PATH + "{name}",
        response_class=Response,
        responses={200: {"content": {kind: {} for kind in responses.TYPES.values()}}},
    )
    async def made(name: str) -> Response:
        """A file that an answer named, for as long as it is kept; it needs no token."""
        file = service.files.get(name)
        if file is None:
            raise ApiError(
                404,
                "no such file: it never was, or its time was up, or newer ones took its place",
                code="not_found",
            )
        return Response(file.data, media_type=responses.TYPES[file.suffix], headers=_OF_FILES)

    @app.get("/v1/models", response_model=api.ModelList)
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{model}", response_model=api.ModelCard)
    async def model_card(model: str) -> dict[str, Any]:
        """What the model reads and makes."""
        service.check_model(model)
        return service.card

    @app.get("/", include_in_schema=False)
    async def start_page(request: Request) -> Response:
        """What this is."""
        base = str(request.base_url).rstrip("/")
        page = pages.start(base, service.settings.token is not None)
        return HTMLResponse(page, headers=pages.HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def reference() -> Response:
        """Paths and fields."""
        return HTMLResponse(pages.reference(app.openapi()), headers=pages.HEADERS)

    @app.get("/health", response_model=api.Health)
    async def health() -> dict[str, Any]:
        """Whether the engine works."""
        if not service.dispatcher.alive:
            raise ApiError(503, "the engine has ended; restart the server", code="not_healthy")
        return {"status": "ok", "waiting": service.dispatcher.num_waiting}

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "For Prometheus."}},
    )
    async def metrics() -> Response:
        """Counts and times."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def new_seed(room: int = 1) -> int:
    """As `Chat.reply` draws one; `room`: how many are counted on from it."""
    return random.randrange(2**31 - room)


def replaced(error: ApiError, status: int) -> ApiError:
    return ApiError(status, error.message, param=error.param, code=error.code)


async def unless_gone(request: Request, work: asyncio.Future[Any]) -> Any:
    """The result of `work`; when the client goes away before, the work is dropped."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(CLOSED, "the client went away")
        return work.result()
    finally:
        work.cancel()
        leaving.cancel()


async def _lines(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events; an error in their midst is one of them."""
    try:
        async for chunk in chunks:
            yield responses.sse_event(chunk)
    except Cancelled:
        return
    except Exception as error:
        yield responses.sse_event(errors.to_api_error(error).body())
    yield responses.sse_event("[DONE]")


def _document(app: FastAPI, settings: ServerSettings) -> None:
    """Say in the OpenAPI document what bodies look like, and that a token is needed, where one
    is."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(bodies.component_schemas())
        if settings.token is not None:
            schemes = document["components"].setdefault("securitySchemes", {})
            schemes["token"] = {"type": "http", "scheme": "bearer"}
            document["security"] = [{"token": []}]
        return document

    app.openapi = openapi
