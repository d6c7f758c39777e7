"""Images by Stable Diffusion XL (Podell et al. 2023): a UNet conditioned on two CLIPs and the size.

Legend: M media, P caption tokens, E width of both text encoders together, E2 pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmllm.decoders.config import ImageConfig, Img2ImgConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import standardize, vae_scale_factor
from mmllm.decoders.visual import ImageDecoder


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
    inpaint_class = "StableDiffusionXLInpaintPipeline"
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
        """Zeros without a negative prompt, if the pipeline was trained so."""
        if not self.config.negative_prompt and self.pipeline.config.force_zeros_for_empty_prompt:
            return self.zero_condition(num)
        return super().unconditional(num)

    def compute_size(self) -> tuple[int, int]:
        side = self.component_config("unet")["sample_size"] * vae_scale_factor(self)
        return self.resolve_size((side, side), 8)

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions), None, self.device, 1, False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_latents(self, samples: Tensor) -> Tensor:
        """In float32 if the codec overflows in half precision (`force_upcast` in its config)."""
        vae = self.pipeline.vae
        if samples.dtype != torch.float16 or not vae.config.force_upcast:
            return super().encode_latents(samples)
        try:
            return vae.float().encode(samples.float()).latent_dist.mode()
        finally:
            vae.half()

    def normalize_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        if vae.config.latents_mean is not None and vae.config.latents_std is not None:
            latents = standardize(vae, latents)
        return latents * vae.config.scaling_factor

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        height, width = self.size
        time_ids = noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)
        return self.pipeline.unet(
            noisy,
            timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": condition["pooled_prompt_embeds"],
                "time_ids": time_ids,  # original size, crop offset 0, target size
            },
            return_dict=False,
        )[0]


def build(config: SDXLConfig) -> SDXLDecoder:
    return SDXLDecoder(config)
