"""Progress of a pipeline's denoising loop: steps and previews."""

from __future__ import annotations

from collections.abc import Container
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
    """The callbacks by the name that a pipeline with these `parameters` has for one.

    An exception from a callback leaves the denoising loop at once; the next call resets the
    scheduler's state. `strength`: the share of the steps that are run.
    """
    if on_step is None and on_preview is None:
        return {}

    def report(step: int, steps: int, latents: Tensor) -> None:
        with_preview = {steps * part // _NUM_PREVIEWS for part in range(1, _NUM_PREVIEWS)}
        if on_preview and step in with_preview and (images := decoder.decode_preview(latents)):
            on_preview(images)
        if on_step:
            on_step(step, steps)

    def callback(pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # Solvers of a higher order call more often than `num_inference_steps`.
        report(step + 1, pipe.num_timesteps, tensors["latents"])
        return tensors

    def legacy_callback(step: int, _time: Any, latents: Tensor) -> None:
        steps = int(decoder.config.steps * strength)
        report(min(step + 1, steps), steps, latents)

    if "callback_on_step_end" in parameters:
        return {"callback_on_step_end": callback}
    return {"callback": legacy_callback}


def step_of_batch(on_step: OnStep, row: int, num: int) -> OnStep:
    """A callback for medium `row` of `num`, whose steps are counted as those of the whole batch."""
    return lambda step, steps: on_step(row * steps + step, num * steps)
