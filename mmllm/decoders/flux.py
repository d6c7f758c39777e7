"""Images by FLUX.1 (Black Forest Labs 2024): a DiT over packed latents, conditioned on T5 and CLIP.

Legend: M media, C latent channels, P tokens of T5, E their width, E2 the pooled width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.decoders.config import ImageConfig, Img2ImgConfig, ReferenceConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import shift_and_scale, vae_scale_factor
from mmllm.decoders.visual import ImageDecoder
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class FluxConfig(ImageConfig, SequenceConfig, Img2ImgConfig, ReferenceConfig):
    """A `FluxPipeline`, or a `FluxKontextPipeline`, which takes a reference (Labs et al. 2025).

    `guidance` is an input of the distilled transformer; FLUX.1-schnell takes none, 4 `steps` and
    256 `max_caption_tokens`.

    Attributes:
        true_cfg_scale: above 1 adds classifier-free guidance by the negative prompt, at twice the
            time.
    """

    steps: int = 28
    guidance: float = 3.5
    true_cfg_scale: float = 1.0
    max_caption_tokens: int = 512


class FluxDecoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E], padding included, and `pooled_prompt_embeds` [E2]."""

    pipelines: ClassVar = ["FluxPipeline", "FluxKontextPipeline"]
    img2img_class = "FluxImg2ImgPipeline"
    inpaint_class = "FluxInpaintPipeline"
    init_modality = "image"

    def __init__(self, config: FluxConfig):
        super().__init__(config)
        if self.is_kontext:
            self.inpaint_class = "FluxKontextInpaintPipeline"
            self.max_references, self.masks_references = 1, True
        if config.negative_prompt and config.true_cfg_scale <= 1:
            raise ConfigError("negative_prompt: FLUX uses it only with a true_cfg_scale above 1")
        if config.cache == "pyramid_attention" and config.true_cfg_scale > 1:
            raise ConfigError(
                "cache: 'pyramid_attention' takes the two calls of a step for two steps; with a "
                "true_cfg_scale above 1 expected first_block, taylorseer or null"
            )

    @property
    def is_kontext(self) -> bool:
        """Whether the transformer was trained with a reference."""
        return self.pipeline_class == "FluxKontextPipeline"

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        transformer = self.component_config("transformer")
        return {
            "prompt_embeds": (self.config.max_caption_tokens, transformer["joint_attention_dim"]),
            "pooled_prompt_embeds": (transformer["pooled_projection_dim"],),
        }

    def compute_size(self) -> tuple[int, int]:
        scale = vae_scale_factor(self)
        return self.resolve_size((128 * scale, 128 * scale), 2 * scale)

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(captions), None, self.device, max_sequence_length=self.config.max_caption_tokens
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return shift_and_scale(self.pipeline.vae, latents)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.denoise_with_references(condition, noisy, timesteps, noisy[:0])

    def denoise_with_references(
        self, condition: Condition, noisy: Tensor, timesteps: Tensor, references: Tensor
    ) -> Tensor:
        """The tokens of a reference follow those of the image, with 1 as their first coordinate."""
        pipeline, (height, width) = self.pipeline, noisy.shape[2:]
        tokens = pipeline._pack_latents(noisy, *noisy.shape)
        ids = pipeline._prepare_latent_image_ids(
            len(noisy), height // 2, width // 2, noisy.device, noisy.dtype
        )
        num = tokens.shape[1]
        for reference in references:
            tokens = torch.cat([tokens, pipeline._pack_latents(reference, 1, *noisy.shape[1:])], 1)
            ids = torch.cat([ids, ids[:num] + ids.new_tensor([1, 0, 0])])
        embeds, guidance = condition["prompt_embeds"], None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full([len(noisy)], self.config.guidance, device=noisy.device)
        predicted = pipeline.transformer(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=condition["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=ids,
            joint_attention_kwargs={},
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(predicted[:, :num], height, width, 1)

    def pipeline_kwargs(self) -> dict[str, Any]:
        kwargs = super().pipeline_kwargs()
        if self.is_kontext:  # it would make a million pixels, whatever the size
            kwargs |= {"max_area": math.prod(self.size), "_auto_resize": False}
        return kwargs

    def reference_kwargs(self, references: Sequence[Any], name: str) -> dict[str, Any]:
        return {name: self.fit(references[0])}

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        cfg_scale = self.config.true_cfg_scale
        kwargs = {"guidance_scale": scale, "true_cfg_scale": cfg_scale}
        return kwargs | (self.negative_kwargs(negative()) if cfg_scale > 1 else {})


def build(config: FluxConfig) -> FluxDecoder:
    return FluxDecoder(config)
