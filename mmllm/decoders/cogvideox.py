"""Video by CogVideoX (Yang et al. 2024): a DiT over the joint sequence of caption and video tokens.

Legend: M media, C latent channels, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmllm.decoders.config import Img2ImgConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import vae_scale_factor
from mmllm.decoders.visual import VideoDecoder, check_frames
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class CogVideoXConfig(VideoConfig, Img2ImgConfig):
    """A `CogVideoXPipeline`. The 2B and 5B models were trained on 49 frames, 1.5 on 81."""

    steps: int = 50
    guidance: float = 6.0
    frames: int = 49


class CogVideoXDecoder(VideoDecoder):
    """Condition: `prompt_embeds` [P, E], padding included; P is fixed by the transformer."""

    pipelines: ClassVar = ["CogVideoXPipeline"]
    img2img_class = "CogVideoXVideoToVideoPipeline"
    init_modality = "video"

    init_one_by_one = True  # it confuses the number of media with that of their frames

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        transformer = self.component_config("transformer")
        return {
            "prompt_embeds": (transformer["max_text_seq_length"], transformer["text_embed_dim"])
        }

    def compute_size(self) -> tuple[int, int]:
        transformer, scale = self.component_config("transformer"), vae_scale_factor(self)
        check_frames(
            self.config.frames, int(self.component_config("vae")["temporal_compression_ratio"])
        )
        default = transformer["sample_height"] * scale, transformer["sample_width"] * scale
        return self.resolve_size(default, max(8, scale * transformer["patch_size"]))

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        tokens, _ = self.condition_shapes["prompt_embeds"]
        embeds, _ = self.pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=tokens,
            device=self.device,
        )
        return {"prompt_embeds": embeds}

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The transformer takes [M, F, C, h, w]."""
        pipeline, settings = self.pipeline, self.pipeline.transformer.config
        frames, rotary = noisy.shape[2], None
        if settings.patch_size_t and frames % settings.patch_size_t:
            raise ConfigError(
                f"video: {self.config.frames} frames are {frames} latents, which this transformer "
                f"reads by {settings.patch_size_t}; its denoising loss needs a multiple"
            )
        if settings.use_rotary_positional_embeddings:
            rotary = pipeline._prepare_rotary_positional_embeddings(
                *self.size, frames, noisy.device
            )
        predicted = pipeline.transformer(
            hidden_states=noisy.transpose(1, 2),
            encoder_hidden_states=condition["prompt_embeds"],
            timestep=timesteps,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return predicted.transpose(1, 2)


def build(config: CogVideoXConfig) -> CogVideoXDecoder:
    return CogVideoXDecoder(config)
