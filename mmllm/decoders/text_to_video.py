"""Clips by text-to-video synthesis (ModelScope, ZeroScope; Wang et al. 2023): a UNet over space and
time in the latents of a codec of pictures.

Legend: M clips, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmllm.decoders.base import Condition
from mmllm.decoders.visual import ClipConfig, ClipDecoder, shrinkage


@dataclass(frozen=True)
class TextToVideoConfig(ClipConfig):
    """A `TextToVideoSDPipeline`. ZeroScope v2 was made for 24 frames of 320 x 576."""

    steps: int = 25
    guidance: float = 9.0


class TextToVideoDecoder(ClipDecoder):
    """Condition: `prompt_embeds` [P, E], all P positions of the CLIP text encoder."""

    pipelines: ClassVar = ["TextToVideoSDPipeline"]

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.component_config("tokenizer")["model_max_length"]
        return {"prompt_embeds": (tokens, self.component_config("text_encoder")["hidden_size"])}

    def _size(self) -> tuple[int, int]:
        side = self.component_config("unet")["sample_size"] * shrinkage(self)
        return self._chosen((side, side), 8)

    def _read(self, captions: list[str]) -> Condition:
        return {"prompt_embeds": self.pipeline.encode_prompt(captions, self.device, 1, False)[0]}

    def _mode(self, samples: Tensor) -> Tensor:
        """Frame by frame: [M, 3, F, H, W] -> [M, C, F, h, w]."""
        return torch.stack([super(type(self), self)._mode(f) for f in samples.unbind(2)], dim=2)

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.unet(
            noisy, timesteps, encoder_hidden_states=condition["prompt_embeds"], return_dict=False
        )[0]


def build(config: TextToVideoConfig) -> TextToVideoDecoder:
    return TextToVideoDecoder(config)
