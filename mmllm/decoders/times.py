"""The noise levels at which a decoder's denoising loss is measured.

A time t in (0, 1) is a noise level, 1 = noise (mmllm.decoders.schedules). The levels that a model
was trained at differ by family: diffusion models drew them uniformly; models of flow matching draw
most of them from the middle, and move them towards noise where latents are large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmllm.config import DenoiseConfig
from mmllm.decoders.contract import DecoderContract


@dataclass(frozen=True)
class TimeDistribution:
    """A distribution of times.

    Attributes:
        normal: mean and standard deviation of the normal variable whose sigmoid is the time; None:
            the time is uniform.
        shift: s of t -> s t / (1 + (s - 1) t), which moves times towards noise (Esser et al. 2024,
            sec. 5.3.2).
    """

    normal: tuple[float, float] | None = None
    shift: float = 1.0

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draw one time: float[]."""
        if self.normal is None:
            time = torch.rand((), generator=generator)
        else:
            mean, std = self.normal
            time = torch.sigmoid(mean + std * torch.randn((), generator=generator))
        if self.shift != 1.0:
            time = self.shift * time / (1 + (self.shift - 1) * time)
        return time


UNIFORM = TimeDistribution()


def time_distribution(decoder: DecoderContract, options: DenoiseConfig) -> TimeDistribution:
    """Return the distribution that a stage asks for.

    Args:
        decoder: its scheduler's config decides what `auto` means, and the shift unless it is given.
        options: `stage.denoise`.
    """
    scheduler = decoder.component_config("scheduler")
    is_flow = scheduler["_class_name"].startswith("FlowMatch") or bool(
        scheduler.get("use_flow_sigmas")
    )
    normal = options.times == "logit_normal" or (options.times == "auto" and is_flow)
    moves = options.times == "shifted" or (options.times == "auto" and is_flow)
    own = 1.0 if options.shift is None and not moves else options.shift or _shift_of(scheduler)
    return TimeDistribution((options.mean, options.std) if normal else None, own)


def _shift_of(scheduler: dict[str, Any]) -> float:
    """The shift by which a scheduler's sampler moves its noise levels; where it depends on the size
    of the latents, that of its largest."""
    if scheduler.get("use_dynamic_shifting"):
        return math.exp(scheduler.get("max_shift") or 1.15)  # diffusers' default
    return float(scheduler.get("shift") or scheduler.get("flow_shift") or 1.0)
