"""`POST /v1/audio/speech` and `POST /v1/audio/transcriptions`."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from mmllm.conversation import user
from mmllm.server import bodies, encoding
from mmllm.server import schemas as api
from mmllm.server.dispatcher import ReplyJob
from mmllm.server.service import Service, new_seed, unless_disconnected

_SPEECH = {
    "content": {encoding.MEDIA_TYPES[name]: {} for name in ("wav", "flac", "mp3")},
    "description": "The audio file.",
}
_TRANSCRIPTION = {"content": {"text/plain": {}}, "description": "The text, as JSON or alone."}


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/audio/speech",
        response_class=Response,
        responses={200: _SPEECH},
        openapi_extra=bodies.documented(api.SpeechRequest),
    )
    async def speech(
        request: Request,
        body: Annotated[api.SpeechRequest, Depends(bodies.read(api.SpeechRequest))],
    ) -> Response:
        """Generate the sound that a text describes."""
        service.check_model(body.model, body.ignored)
        options = await asyncio.to_thread(service.options.single_medium, "audio", body.decoder)
        ((audio, seed),) = await service.generate_media(request, body.input, options, body.seed)
        suffix = body.response_format or "wav"
        return Response(
            await encoding.encode_medium(audio, suffix),
            media_type=encoding.MEDIA_TYPES[suffix],
            headers=encoding.ignored_header(body.ignored, **{"x-mmllm-seed": str(seed)}),
        )

    @app.post(
        "/v1/audio/transcriptions",
        response_model=api.TranscriptionResponse,
        responses={200: _TRANSCRIPTION},
        openapi_extra=bodies.documented_form(api.TranscriptionRequest, "file"),
    )
    async def transcriptions(
        request: Request,
        form: Annotated[tuple[api.TranscriptionRequest, bytes], Depends(bodies.read_transcription)],
    ) -> Response:
        """Describe an audio file in words."""
        body, file = form
        service.check_model(body.model, body.ignored)
        options = service.options.transcription(body)
        decoding = service.parser.upload(file, "audio", "file")
        audio = await unless_disconnected(request, asyncio.ensure_future(decoding))
        message = user(audio, body.prompt or api.TRANSCRIPTION_PROMPT)
        (reply,) = await service.replies(request, ReplyJob([message], options, new_seed()))
        headers = encoding.ignored_header(body.ignored)
        if body.response_format == "text":
            return PlainTextResponse(reply.text, headers=headers)
        extras = encoding.reply_extras([reply], body.ignored)
        return JSONResponse({"text": reply.text, "mmllm": extras}, headers=headers)
