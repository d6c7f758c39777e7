"""Images by PixArt-alpha pipelines (Chen et al. 2023): a DiT that cross-attends to T5.

Legend: M media, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Image, Medium
from mmllm.decoders.config import Img2ImgConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import vae_scale_factor
from mmllm.decoders.prompts import encode_with_t5
from mmllm.decoders.visual import ImageDecoder, MaskedPrompt


@dataclass(frozen=True)
class PixArtConfig(SequenceConfig, Img2ImgConfig):
    """A `PixArtAlphaPipeline`; images have the size that its transformer was trained for."""


class PixArtDecoder(MaskedPrompt, ImageDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_attention_mask` [P]."""

    pipelines: ClassVar = ["PixArtAlphaPipeline"]
    init_modality = "image"
    min_steps: ClassVar[int] = 2  # with one, the pipeline needs a solver that returns clean samples

    def compute_size(self) -> tuple[int, int]:
        side = self.component_config("transformer")["sample_size"] * vae_scale_factor(self)
        return side, side

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_with_t5(self, captions)

    def clean_prompt(self, caption: str) -> str:
        # The optional deep cleaning (URLs, file names) would depend on what else is installed.
        return self.pipeline._text_preprocessing(caption, clean_caption=False)[0]

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        transformer = self.pipeline.transformer
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.config.sample_size == 128:  # the pipeline's own test for its 1024-px models
            added["resolution"] = noisy.new_full((len(noisy), 2), self.size[0])
            added["aspect_ratio"] = noisy.new_ones(len(noisy), 1)
        return transformer(
            noisy,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def pipeline_kwargs(self) -> dict[str, Any]:
        # The default negative prompt "" would run the text encoder: ours is encoded already.
        return {"negative_prompt": None, "use_resolution_binning": False}

    def prepare_img2img(self, media: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        pixels = torch.stack([self.preprocess(medium) for medium in media])
        return self.img2img, {"pixels": pixels, "strength": self.config.strength}

    @property
    def takes_mask(self) -> bool:
        return True

    def prepare_inpainting(
        self, media: Sequence[Any], masks: Sequence[Any]
    ) -> tuple[Any, dict[str, Any]]:
        pipeline, kwargs = self.prepare_img2img(media)
        own = torch.stack([torch.from_numpy(self.fit_mask(mask)) for mask in masks])
        return pipeline, {**kwargs, "mask": own[:, None].float()}

    def img2img(
        self,
        *,
        pixels: Tensor,
        strength: float,
        mask: Tensor | None = None,
        guidance_scale: float,
        num_inference_steps: int,
        generator: list[torch.Generator],
        output_type: str,
        callback: Callable[[int, Any, Tensor], None] | None = None,
        **condition: Tensor,
    ) -> Any:
        """Sample images from images, which diffusers lacks for PixArt; called as PixArt's pipeline.

        Noise is added to the latents of the images, then the last steps are run. With a mask, the
        latents where it is black are after each step those of the image at the noise level that is
        reached, as in diffusers' inpainting (blended latent diffusion, Avrahami et al. 2022).

        Args:
            pixels: float[M, 3, H, W] in [-1, 1], the images to start from.
            strength: the share of the steps that are run, in (0, 1]; 1 ignores the images.
            mask: float[M, 1, H, W], 1 where the images may change, else 0.
            guidance_scale: that of classifier-free guidance; 1 is without.
            num_inference_steps: steps of the whole schedule.
            generator: one for each image, for the noise.
            output_type: "pil", "np", "pt" or "latent".
            callback: called after every step with (step, time, latents).
            **condition: prompt embeddings and masks; with guidance also negative ones.

        Returns:
            diffusers' ImagePipelineOutput.
        """
        from diffusers import ImagePipelineOutput
        from diffusers.utils.torch_utils import randn_tensor

        pipeline, scheduler, guided = self.pipeline, self.pipeline.scheduler, guidance_scale > 1
        for name in self.condition_shapes if guided else ():
            negative = condition.pop(f"negative_{name}")
            condition[name] = torch.cat([negative, condition[name]])
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        times = scheduler.timesteps[-int(num_inference_steps * strength) * scheduler.order :]
        scheduler.set_begin_index(len(scheduler.timesteps) - len(times))
        clean = self.encode_media(pixels).to(self.dtype)
        noise = randn_tensor(clean.shape, generator, self.device, self.dtype)
        noisy = scheduler.add_noise(clean, noise, times[:1].repeat(len(clean)))
        blend = None if mask is None else F.interpolate(mask, clean.shape[-2:]).to(clean)
        extra = pipeline.prepare_extra_step_kwargs(generator, 0.0)
        for step, time in enumerate(times):
            inputs = scheduler.scale_model_input(torch.cat([noisy] * (1 + guided)), time)
            predicted = self.denoise(condition, inputs, time.expand(len(inputs)))
            predicted = predicted[:, : clean.shape[1]]
            if guided:
                uncond, cond = predicted.chunk(2)
                predicted = uncond + guidance_scale * (cond - uncond)
            noisy = scheduler.step(predicted, time, noisy, return_dict=False, **extra)[0]
            if blend is not None:
                following = times[step + 1 : step + 2].repeat(len(clean))
                kept = scheduler.add_noise(clean, noise, following) if len(following) else clean
                noisy = torch.lerp(kept, noisy, blend)
            if callback:
                callback(step, time, noisy)
        latents = noisy / pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(latents, return_dict=False)[0]
        return ImagePipelineOutput(pipeline.image_processor.postprocess(decoded, output_type))

    def decode_preview(self, latents: Tensor) -> list[Medium]:
        """At most 128 pixels a side."""
        vae = self.pipeline.vae
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        small = F.interpolate(pixels.float(), min(pixels.shape[-1], 128), mode="area")
        bytes_ = ((small.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return [Image.from_numpy(image) for image in bytes_.cpu().numpy()]


def build(config: PixArtConfig) -> PixArtDecoder:
    return PixArtDecoder(config)
