"""Images by FLUX.2 (Black Forest Labs 2025): a DiT over packed latents, conditioned on three layers
of a Mistral (dev) or a Qwen3 (klein).

Legend: M media, C latent channels, P caption tokens, E the width of the three layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmllm.decoders.config import ImageConfig, InitMediaConfig, ReferenceConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import vae_scale_factor
from mmllm.decoders.visual import ImageDecoder
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class Flux2Config(ImageConfig, SequenceConfig, InitMediaConfig, ReferenceConfig):
    """A `Flux2Pipeline`, whose transformer takes `guidance` as an input and no negative prompt, or
    a `Flux2KleinPipeline`, with classifier-free guidance; its distilled models take a `guidance`
    of 1 and 4 `steps`. `init_media: last` makes the newest picture its one reference."""

    steps: int = 50
    guidance: float = 4.0
    max_caption_tokens: int = 512
    references: Literal["none", "auto", "all"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_media != "none" and self.references != "none":
            raise ConfigError(
                "init_media and references both condition FLUX.2 on a picture; give one of them"
            )


class Flux2Decoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E], padding included."""

    pipelines: ClassVar = ["Flux2Pipeline", "Flux2KleinPipeline"]
    init_modality = "image"
    init_one_by_one = True  # several would all condition every caption
    max_references = 10

    def __init__(self, config: Flux2Config):
        super().__init__(config)
        self.embeds_guidance = self.pipeline_class == "Flux2Pipeline"
        if not self.embeds_guidance:
            self.inpaint_class = "Flux2KleinInpaintPipeline"
        if self.embeds_guidance and config.negative_prompt:
            raise ConfigError("negative_prompt: a Flux2Pipeline takes none")

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.component_config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": (self.config.max_caption_tokens, width)}

    def compute_size(self) -> tuple[int, int]:
        scale = vae_scale_factor(self)
        return self.resolve_size((128 * scale, 128 * scale), 2 * scale)

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        embeds, _ = self.pipeline.encode_prompt(
            list(captions), self.device, max_sequence_length=self.config.max_caption_tokens
        )
        return {"prompt_embeds": embeds}

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """[M, C, 2h, 2w] -> [M, 4C, h, w], standardised by the codec's batch norm."""
        vae, patches = self.pipeline.vae, self.pipeline._patchify_latents(latents)
        mean, variance = (
            value.view(1, -1, 1, 1).to(patches)
            for value in (vae.bn.running_mean, vae.bn.running_var)
        )
        return (patches - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.denoise_with_references(condition, noisy, timesteps, noisy[:0])

    def denoise_with_references(
        self, condition: Condition, noisy: Tensor, timesteps: Tensor, references: Tensor
    ) -> Tensor:
        pipeline = self.pipeline
        tokens = pipeline._pack_latents(noisy)
        ids = pipeline._prepare_latent_ids(noisy).to(noisy.device)
        num = tokens.shape[1]
        if len(references):
            own = pipeline._pack_latents(references).flatten(0, 1)[None]
            own_ids = pipeline._prepare_image_ids(list(references[:, None]))
            tokens = torch.cat([tokens, own], dim=1)
            ids = torch.cat([ids, own_ids.to(noisy.device)], dim=1)
        embeds, guidance = condition["prompt_embeds"], None
        if self.embeds_guidance:
            guidance = torch.full([len(noisy)], self.config.guidance, device=noisy.device)
        predicted = pipeline.transformer(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=embeds,
            txt_ids=pipeline._prepare_text_ids(embeds).to(noisy.device),
            img_ids=ids,
            return_dict=False,
        )[0]
        return predicted[:, :num].transpose(1, 2).reshape(noisy.shape)

    def prepare_img2img(self, media: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """The same pipeline, with the image as a second condition."""
        return self.pipeline, {"image": self.fit(media[0])}

    def prepare_inpainting(
        self, media: Sequence[Any], masks: Sequence[Any]
    ) -> tuple[Any, dict[str, Any]]:
        pipeline, kwargs = super().prepare_inpainting(media, masks)
        return pipeline, {**kwargs, "strength": 1.0}

    def reference_kwargs(self, references: Sequence[Any], name: str) -> dict[str, Any]:
        return {name: [self.fit(reference) for reference in references]}

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        if self.embeds_guidance:
            return {"guidance_scale": scale}
        return super().guidance_kwargs(scale, negative)


def build(config: Flux2Config) -> Flux2Decoder:
    return Flux2Decoder(config)
