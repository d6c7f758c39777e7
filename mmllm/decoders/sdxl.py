"""Pictures by Stable Diffusion XL (Podell et al. 2023): a UNet told of two CLIPs and of the size.

Legend: M pictures, P caption tokens, E the width of both text encoders together, E2 the pooled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmllm.decoders.base import Condition, Img2ImgConfig
from mmllm.decoders.visual import ImageConfig, ImageDecoder, vae_scale_factor


@dataclass(frozen=True)
class SDXLConfig(ImageConfig, Img2ImgConfig):
    """A `StableDiffusionXLPipeline`. For its distilled descendants (Turbo, Lightning, LCM) few
    `steps`, a `guidance` of 1 and the `scheduler` that their authors name."""

    steps: int = 25
    guidance: float = 5.0


class SDXLDecoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E] and `pooled_prompt_embeds` [E2]."""

    pipelines: ClassVar = ["StableDiffusionXLPipeline"]
    img2img_class = "StableDiffusionXLImg2ImgPipeline"
    init_modality = "image"

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        first, second = map(self.component_config, ("text_encoder", "text_encoder_2"))
        tokens = self.component_config("tokenizer")["model_max_length"]
        return {
            "prompt_embeds": (tokens, first["hidden_size"] + second["hidden_size"]),
            "pooled_prompt_embeds": (second["projection_dim"],),
        }

    def unconditional(self, num: int) -> Condition:
        """Without a negative caption: zeros, if the pipeline was trained so."""
        if not self.config.negative_prompt and self.pipeline.config.force_zeros_for_empty_prompt:
            return self._zeros(num)
        return super().unconditional(num)

    def _size(self) -> tuple[int, int]:
        side = self.component_config("unet")["sample_size"] * vae_scale_factor(self)
        return self._chosen((side, side), 8)

    def _read(self, captions: list[str]) -> Condition:
        words, _, pooled, _ = self.pipeline.encode_prompt(captions, None, self.device, 1, False)
        return {"prompt_embeds": words, "pooled_prompt_embeds": pooled}

    def _mode(self, samples: Tensor) -> Tensor:
        """The published codec overflows in half precision and says so."""
        vae = self.pipeline.vae
        if samples.dtype != torch.float16 or not vae.config.force_upcast:
            return super()._mode(samples)
        try:
            return vae.float().encode(samples.float()).latent_dist.mode()
        finally:
            vae.half()

    def _normalise(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = (
                latents.new_tensor(values).view(-1, 1, 1)  # [C, 1, 1]
                for values in (config.latents_mean, config.latents_std)
            )
            latents = (latents - mean) / std
        return latents * config.scaling_factor

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        height, width = self.size
        sizes = noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)
        return self.pipeline.unet(
            noisy,
            timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": condition["pooled_prompt_embeds"],
                "time_ids": sizes,  # original, cropped by nothing, target
            },
            return_dict=False,
        )[0]


def build(config: SDXLConfig) -> SDXLDecoder:
    return SDXLDecoder(config)
