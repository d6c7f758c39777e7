"""`POST /v1/images/generations` and `POST /v1/images/edits`."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
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
        openapi_extra=bodies.documented_form(
            api.EditRequest, "image", optional=("image[]", "mask")
        ),
    )
    async def edits(
        request: Request,
        form: Annotated[bodies.EditForm, Depends(bodies.read_edit)],
    ) -> Response:
        """Generate images from uploaded ones: they condition the decoder, or it starts from one.
        With a mask only what is transparent in it changes in the first image."""
        body = form.body
        service.check_model(body.model, body.ignored)
        options = await asyncio.to_thread(
            service.options.edit, body, len(form.images), has_mask=form.mask is not None
        )
        files = [(file, "image", "image") for file in form.images]
        files += [] if form.mask is None else [(form.mask, "mask", "mask")]
        decoding = asyncio.ensure_future(service.parser.uploads(files))
        media = await unless_disconnected(request, decoding)
        images = media[: len(form.images)]
        if form.mask is not None:
            options = service.options.with_mask(options, images, media[-1])
        return await respond(request, body, options, images)

    async def respond(
        request: Request,
        body: api.ImageRequest,
        options: ReplyOptions,
        sources: Sequence[Medium] = (),
    ) -> Response:
        """Generate the images of a request and encode them as it asks."""
        made = await service.generate_media(
            request, body.prompt, options, body.seed, body.n or 1, sources
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
