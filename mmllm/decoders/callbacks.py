"""Progress of a pipeline's denoising loop: steps and previews."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor

from mmllm.decoders.contract import DecoderContract, OnPreview, OnStep

_NUM_PREVIEWS = 4
"""A preview costs one pass of the codec: there is one after each quarter of the steps but the last.
"""


def callback_kwargs(
    decoder: DecoderContract,
    parameters: Container[str],
    on_step: OnStep | None,
    on_preview: OnPreview | None,
    strength: float,
) -> dict[str, Any]:
    """Return the callbacks as keyword arguments of a pipeline's call.

    An exception from a callback leaves the denoising loop at once; the next call resets the
    scheduler's state.

    Args:
        decoder: makes the previews.
        parameters: the names of the parameters of the pipeline's call, which tell its callback API.
        on_step: called with (steps done, number of steps).
        on_preview: called with the media so far, decoded cheaply, a few times in a call.
        strength: the share of the steps that are run, 1 unless it starts from media.

    Returns:
        The keyword arguments; empty without callbacks, and for pipelines that take none.
    """
    if on_step is None and on_preview is None:
        return {}

    def report(step: int, steps: int, latents: Tensor) -> None:
        _report(decoder, on_step, on_preview, step, steps, latents)

    def callback(pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # Solvers of a higher order call more often than `num_inference_steps`.
        report(step + 1, pipe.num_timesteps, tensors["latents"])
        return tensors

    def legacy_callback(step: int, _time: Any, latents: Tensor) -> None:
        steps = int(decoder.config.steps * strength)
        report(min(step + 1, steps), steps, latents)

    if "callback_on_step_end" in parameters:
        return {"callback_on_step_end": callback}
    return {"callback": legacy_callback} if "callback" in parameters else {}


@contextlib.contextmanager
def scheduler_reports(
    decoder: DecoderContract,
    pipeline: Any,
    parameters: Container[str],
    on_step: OnStep | None,
    on_preview: OnPreview | None,
) -> Iterator[None]:
    """Inside the block the steps of the scheduler call the callbacks, for pipelines that take none.

    Args:
        decoder: makes the previews.
        pipeline: whose scheduler makes one step after each denoising step.
        parameters: the names of the parameters of the pipeline's call; if there is a callback among
            them, nothing is done here.
        on_step: as for `callback_kwargs`.
        on_preview: as for `callback_kwargs`.
    """
    takes_one = "callback_on_step_end" in parameters or "callback" in parameters
    if takes_one or (on_step is None and on_preview is None):
        yield
        return
    scheduler, done = pipeline.scheduler, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = type(scheduler).step(scheduler, *args, **kwargs)
        done += 1
        _report(decoder, on_step, on_preview, done, len(scheduler.timesteps), result[0])
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _report(
    decoder: DecoderContract,
    on_step: OnStep | None,
    on_preview: OnPreview | None,
    step: int,
    steps: int,
    latents: Tensor,
) -> None:
    """Call the callbacks after a step, from 1."""
    with_preview = {steps * part // _NUM_PREVIEWS for part in range(1, _NUM_PREVIEWS)}
    if on_preview and step in with_preview and (images := decoder.decode_preview(latents)):
        on_preview(images)
    if on_step:
        on_step(step, steps)


def step_of_batch(on_step: OnStep, row: int, num: int) -> OnStep:
    """Return a callback for one medium of several that are sampled one after the other.

    Args:
        on_step: receives (steps done, number of steps) of the whole batch.
        row: the medium's place, from 0.
        num: the number of media.
    """
    return lambda step, steps: on_step(row * steps + step, num * steps)
