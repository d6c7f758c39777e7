"""Models, generated files, pages for browsers, health and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from mmllm.server import encoding, generated_files, pages
from mmllm.server import schemas as api
from mmllm.server.errors import ApiError
from mmllm.server.service import Service

_FILE_HEADERS = {
    "cache-control": "private, max-age=3600",
    "content-security-policy": "default-src 'none'; sandbox",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "cross-origin",
}
_METRICS = {"content": {"text/plain": {}}, "description": "For Prometheus."}


def add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=api.ModelList)
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [service.model_card]}

    @app.get("/v1/models/{model}", response_model=api.ModelCard)
    async def model_card(model: str) -> dict[str, Any]:
        """What the model reads and generates."""
        service.check_model(model)
        return service.model_card

    @app.head(generated_files.PATH + "{name}", include_in_schema=False)
    @app.get(
        generated_files.PATH + "{name}",
        response_class=Response,
        responses={200: {"content": {kind: {} for kind in encoding.MEDIA_TYPES.values()}}},
    )
    async def generated_file(name: str) -> Response:
        """A file whose URL a response held, while it is kept; it needs no token."""
        file = service.files.get(name)
        if file is None:
            raise ApiError(
                404,
                "no such file: it never was, or its time was up, or newer ones took its place",
                code="not_found",
            )
        media_type = encoding.MEDIA_TYPES[file.suffix]
        return Response(file.data, media_type=media_type, headers=_FILE_HEADERS)

    @app.get("/", include_in_schema=False)
    async def start_page(request: Request) -> Response:
        """What this server is."""
        base = str(request.base_url).rstrip("/")
        page = pages.start(base, service.settings.token is not None)
        return HTMLResponse(page, headers=pages.HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def reference() -> Response:
        """Paths and fields."""
        return HTMLResponse(pages.reference(app.openapi()), headers=pages.HEADERS)

    @app.get("/health", response_model=api.Health)
    async def health() -> dict[str, Any]:
        """Whether the dispatcher's threads run."""
        if not service.dispatcher.alive:
            raise ApiError(503, "the engine has ended; restart the server", code="not_healthy")
        return {"status": "ok", "waiting": service.dispatcher.num_waiting}

    @app.get("/metrics", response_class=Response, responses={200: _METRICS})
    async def metrics() -> Response:
        """Counts and times."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
