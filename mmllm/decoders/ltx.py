"""Clips by LTX-Video (HaCohen et al. 2024): a DiT over the tokens of a codec that shrinks much.

Legend: M clips, C latent channels, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mmllm.decoders.base import Condition, InitMediaConfig, SequenceConfig
from mmllm.decoders.visual import MaskedCaptions, VideoConfig, VideoDecoder, check_frames


@dataclass(frozen=True)
class LTXConfig(VideoConfig, SequenceConfig, InitMediaConfig):
    """An `LTXPipeline`; the defaults are the pipeline's. `fps` is part of what it is told."""

    steps: int = 50
    max_caption_tokens: int = 128
    frames: int = 161
    fps: float = 25.0


class LTXDecoder(MaskedCaptions, VideoDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_attention_mask` [P]."""

    pipelines: ClassVar = ["LTXPipeline"]
    passes_sigmas: ClassVar[bool] = True
    img2img_class = "LTXImageToVideoPipeline"
    init_modality = "image"

    def _size(self) -> tuple[int, int]:
        vae = self.component_config("vae")
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        check_frames(self.config.frames, vae["patch_size_t"] * halvings)
        return self._chosen((512, 704), max(32, vae["patch_size"] * halvings))

    def _read(self, captions: Sequence[str]) -> Condition:
        words, mask, _, _ = self.pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_caption_tokens,
            device=self.device,
        )
        return {"prompt_embeds": words, "prompt_attention_mask": mask}

    def _normalise(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return self.pipeline._normalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
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

    def _options(self) -> dict[str, Any]:
        return {"frame_rate": self.config.fps, **super()._options()}


def build(config: LTXConfig) -> LTXDecoder:
    return LTXDecoder(config)
