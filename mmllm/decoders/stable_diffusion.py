"""Images by Stable Diffusion 1.x and 2.x (Rombach et al. 2022): a UNet that attends to CLIP.

Legend: M media, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmllm.decoders.config import ImageConfig, Img2ImgConfig
from mmllm.decoders.visual import ImageDecoder, UNetDecoder


@dataclass(frozen=True)
class StableDiffusionConfig(ImageConfig, Img2ImgConfig):
    """A `StableDiffusionPipeline`."""

    steps: int = 25
    guidance: float = 7.5


class StableDiffusionDecoder(UNetDecoder, ImageDecoder):
    """Condition: `prompt_embeds` [P, E], all P positions of the CLIP text encoder."""

    pipelines: ClassVar = ["StableDiffusionPipeline"]
    img2img_class = "StableDiffusionImg2ImgPipeline"
    inpaint_class = "StableDiffusionInpaintPipeline"
    init_modality = "image"


def build(config: StableDiffusionConfig) -> StableDiffusionDecoder:
    return StableDiffusionDecoder(config)
