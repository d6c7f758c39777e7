"""Video by LTX-Video (HaCohen et al. 2024): a DiT over the tokens of a codec of high compression.

Legend: M media, C latent channels, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mmllm.decoders.config import InitMediaConfig, SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.prompts import encode_with_mask
from mmllm.decoders.visual import MaskedPrompt, VideoDecoder, check_frames


@dataclass(frozen=True)
class LTXConfig(VideoConfig, SequenceConfig, InitMediaConfig):
    """An `LTXPipeline`; the defaults are the pipeline's. The model is conditioned on `fps`."""

    steps: int = 50
    max_caption_tokens: int = 128
    frames: int = 161
    fps: float = 25.0


class LTXDecoder(MaskedPrompt, VideoDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_attention_mask` [P]."""

    pipelines: ClassVar = ["LTXPipeline"]
    passes_sigmas: ClassVar[bool] = True
    img2img_class = "LTXImageToVideoPipeline"
    init_modality = "image"

    def compute_size(self) -> tuple[int, int]:
        vae = self.component_config("vae")
        scale = 2 ** sum(vae["spatio_temporal_scaling"])
        check_frames(self.config.frames, vae["patch_size_t"] * scale)
        return self.resolve_size((512, 704), max(32, vae["patch_size"] * scale))

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_with_mask(self, captions)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return self.pipeline._normalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, grid = self.pipeline, noisy.shape[2:]  # in latents: F, H, W
        patches = (
            pipeline.transformer_spatial_patch_size,
            pipeline.transformer_temporal_patch_size,
        )
        space = pipeline.vae_spatial_compression_ratio
        predicted = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, *patches),
            encoder_hidden_states=condition["prompt_embeds"],
            timestep=timesteps,
            encoder_attention_mask=condition["prompt_attention_mask"],
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            rope_interpolation_scale=(
                pipeline.vae_temporal_compression_ratio / self.config.fps,
                space,
                space,
            ),
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(predicted, *grid, *patches)

    def pipeline_kwargs(self) -> dict[str, Any]:
        return {"frame_rate": self.config.fps, **super().pipeline_kwargs()}


def build(config: LTXConfig) -> LTXDecoder:
    return LTXDecoder(config)
