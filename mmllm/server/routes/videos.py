"""`/v1/videos`: videos are generated as jobs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response

from mmllm.conversation import user
from mmllm.server import bodies, encoding, errors
from mmllm.server import schemas as api
from mmllm.server.dispatcher import ReplyJob
from mmllm.server.errors import ApiError
from mmllm.server.service import Service, new_seed
from mmllm.server.videos import VideoJob

_FILE = {"content": {"video/mp4": {}}, "description": "The video."}
_NOT_READY = {"model": errors.ErrorResponse, "description": "The video is not ready."}


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/videos",
        response_model=api.VideoResponse,
        openapi_extra=bodies.documented(api.VideoRequest, form=True),
    )
    async def create_video(
        body: Annotated[api.VideoRequest, Depends(bodies.read(api.VideoRequest, form=True))],
    ) -> Response:
        """Start to generate a video of a prompt."""
        service.check_model(body.model, body.ignored)
        service.options.check_text(body.prompt, "prompt")
        options = await asyncio.to_thread(
            service.options.single_medium,
            "video",
            body.decoder,
            size=body.size,
            seconds=body.seconds,
            ignored=body.ignored,
        )
        seed = new_seed() if body.seed is None else body.seed
        job = service.videos.create(ReplyJob([user(body.prompt)], options, seed), body.prompt)
        return described(job, encoding.ignored_header(body.ignored))

    def described(job: VideoJob, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse(service.videos.describe(job, service.name), headers=headers)

    @app.get("/v1/videos/{video_id}", response_model=api.VideoResponse)
    async def video(video_id: str) -> Response:
        """The state of a job."""
        return described(service.videos.get(video_id))

    @app.delete("/v1/videos/{video_id}", response_model=api.VideoDeleted)
    async def delete_video(video_id: str) -> dict[str, Any]:
        """Delete a video; a job that is running is cancelled."""
        service.videos.delete(video_id)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=Response,
        responses={200: _FILE, 409: _NOT_READY},
    )
    async def video_content(video_id: str) -> Response:
        """The file of a video that is ready."""
        job = service.videos.get(video_id)
        if job.error is not None:
            error = job.error
            raise ApiError(409, error.message, param=error.param, code=error.code)
        if job.completed is None:
            raise ApiError(
                409, f"the clip is {job.status}; ask again when it is completed", code="not_ready"
            )
        return Response(job.data, media_type="video/mp4")
