"""The ASGI application: the shared service, the middleware, and the routes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

import mmllm
from mmllm.inference.chat import Chat
from mmllm.media import isolated
from mmllm.server import bodies, errors
from mmllm.server.middleware import AdmissionMiddleware
from mmllm.server.routes import audio, chat, images, responses, status, videos
from mmllm.server.service import Service
from mmllm.server.settings import ServerSettings

_STATUSES = {
    400: "The request is not valid.",
    401: "The token is missing or wrong.",
    403: "The server does not accept this host name.",
    404: "Not found.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests.",
    500: "The server failed; its log says why.",
    503: "The server is shutting down.",
}


def build_app(model: Chat, settings: ServerSettings | None = None) -> FastAPI:
    """The server of one model, as an ASGI application.

    Args:
        model: Answers all requests.
        settings: Limits and options.

    Example:
        ```python
        app = build_app(mmllm.load("mini"))
        listener.uvicorn_server(app).run(sockets=[listener.listen("127.0.0.1", 8000)])
        ```
    """
    settings = settings or ServerSettings()
    service = Service(model, settings)

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
        summary="Text, images, audio and video in; text, images, audio and video out.",
        version=mmllm.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
        responses={
            code: {"model": errors.ErrorResponse, "description": text}
            for code, text in _STATUSES.items()
        },
    )
    app.state.service = service
    errors.install(app)
    _document_bodies(app, settings)
    app.add_middleware(AdmissionMiddleware, settings=settings, metrics=service.metrics)  # pyright: ignore
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(settings.allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-mmllm-seed", "x-mmllm-ignored"],
        )
    for module in (chat, responses, images, audio, videos, status):
        module.add_routes(app, service)
    return app


def _document_bodies(app: FastAPI, settings: ServerSettings) -> None:
    """Add the schemas of bodies, and the token where one is needed, to the OpenAPI document."""
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
