"""Pictures by Stable Diffusion 3 (Esser et al. 2024): a DiT that reads two CLIPs and a T5.

Legend: M pictures, P tokens of CLIP and of T5 after them, E their width, E2 the pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmllm.decoders.base import Condition, Img2ImgConfig, SequenceConfig
from mmllm.decoders.visual import ImageConfig, ImageDecoder, shifted, vae_scale_factor


@dataclass(frozen=True)
class SD3Config(ImageConfig, SequenceConfig, Img2ImgConfig):
    """A `StableDiffusion3Pipeline`, with or without its T5. `max_caption_tokens`: of T5."""

    steps: int = 28
    guidance: float = 7.0
    max_caption_tokens: int = 256


class SD3Decoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E], padding included, and `pooled_prompt_embeds` [E2]."""

    pipelines: ClassVar = ["StableDiffusion3Pipeline"]
    img2img_class = "StableDiffusion3Img2ImgPipeline"
    init_modality = "image"

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        transformer = self.component_config("transformer")
        tokens = self.component_config("tokenizer")["model_max_length"]
        return {
            "prompt_embeds": (
                tokens + self.config.max_caption_tokens,
                transformer["joint_attention_dim"],
            ),
            "pooled_prompt_embeds": (transformer["pooled_projection_dim"],),
        }

    @property
    def max_side(self) -> int:
        """The table of positions ends there."""
        transformer = self.component_config("transformer")
        most = transformer.get("pos_embed_max_size", 96)
        return most * vae_scale_factor(self) * transformer["patch_size"]

    def _size(self) -> tuple[int, int]:
        transformer, shrink = self.component_config("transformer"), vae_scale_factor(self)
        side = transformer["sample_size"] * shrink
        return self._chosen((side, side), shrink * transformer["patch_size"])

    def _read(self, captions: list[str]) -> Condition:
        words, _, pooled, _ = self.pipeline.encode_prompt(
            captions,
            None,
            None,
            self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_caption_tokens,
        )
        return {"prompt_embeds": words, "pooled_prompt_embeds": pooled}

    def _normalise(self, latents: Tensor) -> Tensor:
        return shifted(self.pipeline.vae, latents)

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
            return_dict=False,
        )[0]


def build(config: SD3Config) -> SD3Decoder:
    return SD3Decoder(config)
