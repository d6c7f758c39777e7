"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from mmllm.server import bodies, encoding
from mmllm.server import schemas as api
from mmllm.server.chat_responses import ChatResponseWriter
from mmllm.server.dispatcher import ReplyJob
from mmllm.server.errors import bad_request
from mmllm.server.service import Service, new_seed, sse_lines, unless_disconnected

_STREAM = {"content": {"text/event-stream": {}}, "description": "The completion, or its chunks."}


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        responses={200: _STREAM},
        response_model=api.ChatResponse,
        openapi_extra=bodies.documented(api.ChatRequest),
    )
    async def chat_completions(
        request: Request, body: Annotated[api.ChatRequest, Depends(bodies.read(api.ChatRequest))]
    ) -> Response:
        """Answer a conversation with text and media."""
        service.check_model(body.model, body.ignored)
        num = body.n or 1
        if body.stream and num > 1:
            raise bad_request("n: a stream holds one choice; leave out n, or stream", "n")
        options = await asyncio.to_thread(service.options.chat, body)
        parsing = service.parser.conversation(body.messages, options)
        conversation = await unless_disconnected(request, asyncio.ensure_future(parsing))
        seed = new_seed(num) if body.seed is None else body.seed
        if seed + num > 2**63:
            raise bad_request(f"seed: too large to count up from for {num} choices", "seed")
        job = ReplyJob(conversation, options, seed, num)
        writer = ChatResponseWriter(
            service.name,
            service.medium_encoder(
                request,
                body.mmllm and body.mmllm.media,
                body.audio.format if body.audio else "wav",
            ),
            body.ignored,
        )
        if not body.stream:
            replies = await service.replies(request, job)
            headers = encoding.ignored_header(body.ignored)
            return JSONResponse(await writer.response(replies), headers=headers)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = writer.chunks(await service.events(request, job), with_usage=with_usage)
        return service.stream(job, sse_lines(chunks), body.ignored)
