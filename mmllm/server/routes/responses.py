"""`POST /v1/responses`."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from mmllm.server import bodies, encoding
from mmllm.server import schemas as api
from mmllm.server.dispatcher import ReplyJob
from mmllm.server.errors import ApiError
from mmllm.server.responses_schemas import ResponsesRequest
from mmllm.server.responses_writer import ResponsesWriter
from mmllm.server.service import Service, new_seed, sse_lines, unless_disconnected

_STREAM = {"content": {"text/event-stream": {}}, "description": "The response, or its events."}


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/responses",
        responses={200: _STREAM},
        response_model=api.ResponsesResponse,
        openapi_extra=bodies.documented(ResponsesRequest),
    )
    async def responses(
        request: Request,
        body: Annotated[ResponsesRequest, Depends(bodies.read(ResponsesRequest))],
    ) -> Response:
        """Answer a conversation with text and media, in the form of the Responses API."""
        service.check_model(body.model, body.ignored)
        chat = body.to_chat()
        try:
            options = await asyncio.to_thread(service.options.chat, chat)
        except ApiError as error:
            if error.param == "max_tokens":
                error.param, error.message = "max_output_tokens", f"max_output_{error.message[4:]}"
            raise
        num_items = 1 if isinstance(body.input, str) else len(body.input)
        paths = ["instructions"] * (len(chat.messages) - num_items)
        paths += ["input"] if isinstance(body.input, str) else _paths(num_items)
        parsing = service.parser.conversation(chat.messages, options, paths)
        conversation = await unless_disconnected(request, asyncio.ensure_future(parsing))
        job = ReplyJob(conversation, options, new_seed() if body.seed is None else body.seed)
        writer = ResponsesWriter(
            service.name,
            body,
            service.medium_encoder(request, body.mmllm and body.mmllm.media),
        )
        if body.stream:
            events = writer.events(await service.events(request, job))
            return service.stream(job, sse_lines(events, named=True), body.ignored)
        (reply,) = await service.replies(request, job)
        headers = encoding.ignored_header(body.ignored)
        return JSONResponse(await writer.response(reply), headers=headers)


def _paths(num: int) -> list[str]:
    """Where each item stands in the request, for errors."""
    return [f"input.{number}" for number in range(num)]
