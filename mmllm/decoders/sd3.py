"""Images by Stable Diffusion 3 (Esser et al. 2024): a DiT conditioned on two CLIPs and a T5.

Legend: M media, P tokens of CLIP and then of T5, E their width, E2 the pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmllm.decoders.config import ImageConfig, Img2ImgConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import shift_and_scale, vae_scale_factor
from mmllm.decoders.visual import ImageDecoder


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
    inpaint_class = "StableDiffusion3InpaintPipeline"
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
        """The end of the table of positions."""
        transformer = self.component_config("transformer")
        positions = transformer.get("pos_embed_max_size", 96)
        return positions * vae_scale_factor(self) * transformer["patch_size"]

    def compute_size(self) -> tuple[int, int]:
        transformer, scale = self.component_config("transformer"), vae_scale_factor(self)
        side = transformer["sample_size"] * scale
        return self.resolve_size((side, side), scale * transformer["patch_size"])

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions),
            None,
            None,
            self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_caption_tokens,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return shift_and_scale(self.pipeline.vae, latents)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
            return_dict=False,
        )[0]


def build(config: SD3Config) -> SD3Decoder:
    return SD3Decoder(config)
