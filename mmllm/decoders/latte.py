"""Video by Latte (Ma et al. 2024): PixArt's layers for each frame, and layers over time between
them, in the latents of an image codec.

Legend: M media, C latent channels, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.decoders.config import SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import vae_scale_factor
from mmllm.decoders.prompts import encode_with_t5
from mmllm.decoders.visual import VideoDecoder
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class LatteConfig(VideoConfig, SequenceConfig):
    """A `LattePipeline`. The number of frames is fixed by its transformer.

    The transformer attends to the padding too, so `max_caption_tokens` must be the length that it
    was trained with: 120 for the published model.
    """

    steps: int = 50
    guidance: float = 7.5
    max_caption_tokens: int = 120


class LatteDecoder(VideoDecoder):
    """Condition: `prompt_embeds` [P, E], zero after the caption; there is no mask."""

    pipelines: ClassVar = ["LattePipeline"]

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.component_config("transformer")["caption_channels"]
        return {"prompt_embeds": (self.config.max_caption_tokens, width)}

    def compute_size(self) -> tuple[int, int]:
        transformer = self.component_config("transformer")
        if (frames := transformer["video_length"]) != self.config.frames:
            raise ConfigError(
                f"frames: expected {frames}, for which its transformer was made, "
                f"got {self.config.frames}"
            )
        side = transformer["sample_size"] * vae_scale_factor(self)
        return self.resolve_size((side, side), 8 * transformer["patch_size"])

    def pipeline_kwargs(self) -> dict[str, Any]:
        kwargs = super().pipeline_kwargs()
        # Ours are encoded and masked already; the default negative prompt "" would be encoded, too.
        ready = {"negative_prompt": None, "mask_feature": False}
        return {"video_length": kwargs.pop("num_frames"), **ready, **kwargs}

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_with_t5(self, captions)

    def encode_negative_prompt(self, caption: str) -> Condition:
        """As the pipeline does, with what the text encoder makes of the padding."""
        return encode_with_t5(self, [caption], zero_padding=False)

    def clean_prompt(self, caption: str) -> str:
        # The optional deep cleaning (URLs, file names) would depend on what else is installed.
        return self.pipeline._text_preprocessing(caption, clean_caption=False)[0]

    def encode_latents(self, samples: Tensor) -> Tensor:
        """Frame by frame: [M, 3, F, H, W] -> [M, C, F, h, w]."""
        encode = super().encode_latents
        return torch.stack([encode(frame) for frame in samples.unbind(2)], dim=2)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Without the second half of the channels, a variance, as the pipeline does."""
        predicted = self.pipeline.transformer(
            hidden_states=noisy,
            encoder_hidden_states=condition["prompt_embeds"],
            timestep=timesteps,
            enable_temporal_attentions=True,
            return_dict=False,
        )[0]
        return predicted.chunk(2, dim=1)[0]


def build(config: LatteConfig) -> LatteDecoder:
    return LatteDecoder(config)
