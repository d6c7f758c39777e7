"""Pictures by FLUX.1 (Black Forest Labs 2024): a DiT over packed latents, told T5 and pooled CLIP.

Legend: M pictures, C latent channels, P tokens of T5, E their width, E2 the pooled width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.decoders.base import Condition, Img2ImgConfig, SequenceConfig
from mmllm.decoders.visual import ImageConfig, ImageDecoder, shifted, vae_scale_factor
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class FluxConfig(ImageConfig, SequenceConfig, Img2ImgConfig):
    """A `FluxPipeline`. `guidance` is what the distilled transformer is told; FLUX.1-schnell takes
    none, 4 `steps` and 256 `max_caption_tokens`. Only a `true_cfg_scale` above 1 uses the negative
    caption, at twice the time."""

    steps: int = 28
    guidance: float = 3.5
    true_cfg_scale: float = 1.0
    max_caption_tokens: int = 512


class FluxDecoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E], padding included, and `pooled_prompt_embeds` [E2]."""

    pipelines: ClassVar = ["FluxPipeline"]
    img2img_class = "FluxImg2ImgPipeline"
    init_modality = "image"

    def __init__(self, config: FluxConfig):
        super().__init__(config)
        if config.negative_prompt and config.true_cfg_scale <= 1:
            raise ConfigError("negative_prompt: FLUX uses it only with a true_cfg_scale above 1")
        if config.cache == "pyramid_attention" and config.true_cfg_scale > 1:
            raise ConfigError(
                "cache: 'pyramid_attention' takes the two calls of a step for two steps; with a "
                "true_cfg_scale above 1 expected first_block, taylorseer or null"
            )

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        transformer = self.component_config("transformer")
        return {
            "prompt_embeds": (self.config.max_caption_tokens, transformer["joint_attention_dim"]),
            "pooled_prompt_embeds": (transformer["pooled_projection_dim"],),
        }

    def _size(self) -> tuple[int, int]:
        shrink = vae_scale_factor(self)
        return self._chosen((128 * shrink, 128 * shrink), 2 * shrink)

    def _read(self, captions: list[str]) -> Condition:
        words, pooled, _ = self.pipeline.encode_prompt(
            captions, None, self.device, max_sequence_length=self.config.max_caption_tokens
        )
        return {"prompt_embeds": words, "pooled_prompt_embeds": pooled}

    def _normalise(self, latents: Tensor) -> Tensor:
        return shifted(self.pipeline.vae, latents)

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, (height, width) = self.pipeline, noisy.shape[2:]
        words, guidance = condition["prompt_embeds"], None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full([len(noisy)], self.config.guidance, device=noisy.device)
        predicted = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=condition["pooled_prompt_embeds"],
            encoder_hidden_states=words,
            txt_ids=words.new_zeros(words.shape[1], 3),
            img_ids=pipeline._prepare_latent_image_ids(
                len(noisy), height // 2, width // 2, noisy.device, noisy.dtype
            ),
            joint_attention_kwargs={},
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(predicted, height, width, 1)

    def _guidance(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        true = self.config.true_cfg_scale
        away = self._guided(negative()) if true > 1 else {}
        return {"guidance_scale": scale, "true_cfg_scale": true, **away}


def build(config: FluxConfig) -> FluxDecoder:
    return FluxDecoder(config)
