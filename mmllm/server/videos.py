"""Clips as jobs: asked for, looked at while they are made, fetched, and forgotten after a while."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from mmllm.conversation import Medium
from mmllm.errors import quoted
from mmllm.inference.events import Event, Progress
from mmllm.server import encoding
from mmllm.server.dispatcher import Dispatcher, ReplyJob
from mmllm.server.errors import ApiError, to_api_error
from mmllm.server.settings import ServerSettings


@dataclass(eq=False)
class VideoJob:
    """One job, until it is done. `progress`: percent of the denoising steps; `data`: the MP4 file,
    at the end."""

    job: ReplyJob | None
    prompt: str
    seed: int
    id: str = field(default_factory=lambda: encoding.new_id("video_"))
    created: int = field(default_factory=lambda: int(time.time()))
    completed: float | None = None
    progress: int = 0
    seconds: float = 0.0
    size: str = ""
    data: bytes = b""
    error: ApiError | None = None
    task: asyncio.Task[None] | None = None

    @property
    def status(self) -> str:
        if self.completed is not None:
            return "failed" if self.error else "completed"
        return "in_progress" if self.job and self.job.replies.running() else "queued"


class VideoJobs:
    """The clips of one server: bounded in number, each kept for a limited time."""

    def __init__(self, engine: Dispatcher, settings: ServerSettings):
        self.dispatcher = engine
        self.settings = settings
        self._clips: dict[str, VideoJob] = {}

    def create(self, job: ReplyJob, prompt: str) -> VideoJob:
        """Put a job in the line. Raises ApiError (429) when too many are kept."""
        self._forget_old()
        if len(self._clips) >= self.settings.max_videos:
            raise ApiError(
                429,
                f"{len(self._clips)} clips are being made or kept: DELETE one, or try again later",
                code="too_many_videos",
            )
        clip = VideoJob(job, prompt, job.seed)

        def on_event(event: Event) -> None:
            if isinstance(event, Progress):
                clip.progress = 100 * event.step // event.steps

        job.on_event = on_event
        self.dispatcher.submit(job)
        clip.task = asyncio.create_task(self._finish(clip, job))
        self._clips[clip.id] = clip
        return clip

    def get(self, key: str) -> VideoJob:
        """Raise ApiError (404)."""
        self._forget_old()
        if key not in self._clips:
            raise ApiError(
                404,
                f"no video {quoted(key)}: it never was, or was deleted, or its time was up",
                param="video_id",
                code="not_found",
            )
        return self._clips[key]

    def delete(self, key: str) -> None:
        """Forget a clip; one that is being made is stopped."""
        clip = self.get(key)
        del self._clips[key]
        self._stop(clip)

    def close(self) -> None:
        for clip in self._clips.values():
            self._stop(clip)

    def _stop(self, clip: VideoJob) -> None:
        if clip.job is not None:
            self.dispatcher.cancel(clip.job)
        if clip.task is not None:
            clip.task.cancel()

    async def _finish(self, clip: VideoJob, job: ReplyJob) -> None:
        """Wait for a clip's reply and keep its file."""
        try:
            (reply,) = await asyncio.wrap_future(job.replies)
            medium = next(made for made in reply.media if made.modality == "video")
            clip.data = await encoding.encode_medium(medium, "mp4")
            clip.seconds, clip.size = _measure(medium)
            clip.progress = 100
        except Exception as error:
            clip.error = to_api_error(error)
        clip.completed, clip.job = time.time(), None  # a decoded clip is large

    def _forget_old(self) -> None:
        oldest = time.time() - self.settings.retention_seconds
        for key, clip in list(self._clips.items()):
            if clip.completed is not None and clip.completed < oldest:
                del self._clips[key]

    def describe(self, clip: VideoJob, model: str) -> dict[str, Any]:
        """The API's own shape of a job."""
        done = None if clip.completed is None else int(clip.completed)
        failed = clip.error
        return {
            "id": clip.id,
            "object": "video",
            "model": model,
            "status": clip.status,
            "progress": clip.progress,
            "prompt": clip.prompt,
            "seed": clip.seed,
            "created_at": clip.created,
            "completed_at": done,
            "expires_at": None if done is None else done + int(self.settings.retention_seconds),
            "seconds": f"{clip.seconds:g}",
            "size": clip.size,
            "error": failed and {"code": failed.code or "failed", "message": failed.message},
        }


def _measure(medium: Medium) -> tuple[float, str]:
    """(seconds, WIDTHxHEIGHT) of a clip."""
    frames, height, width, _ = medium.to_numpy().shape
    fps = getattr(medium, "fps", None) or 1.0
    return frames / fps, f"{width}x{height}"
