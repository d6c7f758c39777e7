"""Pictures by Stable Diffusion 1.x and 2.x (Rombach et al. 2022): a UNet that attends to CLIP.

Legend: M pictures, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmllm.decoders.base import StrengthConfig
from mmllm.decoders.visual import PictureConfig, PictureDecoder, UNetDecoder


@dataclass(frozen=True)
class StableDiffusionConfig(PictureConfig, StrengthConfig):
    """A `StableDiffusionPipeline`."""

    steps: int = 25
    guidance: float = 7.5


class StableDiffusionDecoder(UNetDecoder, PictureDecoder):
    """Condition: `prompt_embeds` [P, E], all P positions of the CLIP text encoder."""

    pipelines: ClassVar = ["StableDiffusionPipeline"]
    source_pipeline = "StableDiffusionImg2ImgPipeline"
    source_modality = "image"


def build(config: StableDiffusionConfig) -> StableDiffusionDecoder:
    return StableDiffusionDecoder(config)
