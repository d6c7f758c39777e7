"""Video by text-to-video synthesis (ModelScope, ZeroScope; Wang et al. 2023): a UNet over space and
time, in the latents of an image codec.

Legend: M media, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmllm.decoders.config import Img2ImgConfig, VideoConfig
from mmllm.decoders.visual import UNetDecoder, VideoDecoder


@dataclass(frozen=True)
class TextToVideoConfig(VideoConfig, Img2ImgConfig):
    """A `TextToVideoSDPipeline`. ZeroScope v2 was trained on 24 frames of 320 x 576."""

    steps: int = 25
    guidance: float = 9.0


class TextToVideoDecoder(UNetDecoder, VideoDecoder):
    """Condition: `prompt_embeds` [P, E], all P positions of the CLIP text encoder."""

    pipelines: ClassVar = ["TextToVideoSDPipeline"]
    img2img_class = "VideoToVideoSDPipeline"
    init_modality = "video"
    init_one_by_one = True  # it would use each medium's generator for one frame

    def encode_latents(self, samples: Tensor) -> Tensor:
        """Frame by frame: [M, 3, F, H, W] -> [M, C, F, h, w]."""
        encode = super().encode_latents
        return torch.stack([encode(frame) for frame in samples.unbind(2)], dim=2)


def build(config: TextToVideoConfig) -> TextToVideoDecoder:
    return TextToVideoDecoder(config)
