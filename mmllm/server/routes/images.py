"""`POST /v1/images/generations` and `POST /v1/images/edits`."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from mmllm.conversation import Medium
from mmllm.server import bodies, encoding
from mmllm.server import schemas as api
from mmllm.server.dispatcher import ReplyOptions
from mmllm.server.service import Service, unless_disconnected


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/images/generations",
        response_model=api.ImageResponse,
        openapi_extra=bodies.documented(api.ImageRequest),
    )
    async def generations(
        request: Request, body: Annotated[api.ImageRequest, Depends(bodies.read(api.ImageRequest))]
    ) -> Response:
        """Generate images of a prompt."""
        service.check_model(body.model, body.ignored)
        options = await asyncio.to_thread(
            service.options.single_medium,
            "image",
            body.decoder,
            size=body.size,
            ignored=body.ignored,
        )
        return await respond(request, body, options)

    @app.post(
        "/v1/images/edits",
        response_model=api.ImageResponse,
        openapi_extra=bodies.documented_form(api.EditRequest, "image"),
    )
    async def edits(
        request: Request,
        form: Annotated[tuple[api.EditRequest, bytes], Depends(bodies.read_edit)],
    ) -> Response:
        """Generate images that start from an uploaded one."""
        body, file = form
        service.check_model(body.model, body.ignored)
        options = await asyncio.to_thread(service.options.edit, body)
        decoding = service.parser.upload(file, "image", "image")
        source = await unless_disconnected(request, asyncio.ensure_future(decoding))
        return await respond(request, body, options, source)

    async def respond(
        request: Request,
        body: api.ImageRequest,
        options: ReplyOptions,
        source: Medium | None = None,
    ) -> Response:
        """Generate the images of a request and encode them as it asks."""
        made = await service.generate_media(
            request, body.prompt, options, body.seed, body.n or 1, source
        )
        suffix = body.output_format or "png"
        url_of = service.file_urls(request)
        data: list[dict[str, Any]] = []
        for image, seed in made:
            file = await encoding.encode_medium(image, suffix)
            if body.response_format == "url":
                data.append({"url": url_of(file, suffix), "seed": seed})
            else:
                data.append({"b64_json": base64.b64encode(file).decode("ascii"), "seed": seed})
        extras = {"mmllm": encoding.ignored_fields(body.ignored)} if body.ignored else {}
        return JSONResponse(
            {"created": int(time.time()), "data": data, "output_format": suffix, **extras},
            headers=encoding.ignored_header(body.ignored),
        )
