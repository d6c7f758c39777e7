"""Clips by Wan pipelines (Wan Team 2025): a DiT over space and time, its codec causal in time.

Legend: M clips, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

from mmllm.conversation import Medium, Video
from mmllm.decoders.base import Condition, DecoderConfig, ModalityDecoder
from mmllm.errors import ConfigError
from mmllm.media import sample_frames


@dataclass(frozen=True)
class WanConfig(DecoderConfig):
    """A `WanPipeline`. A clip's size is no part of its weights; the defaults are the pipeline's.

    The transformer attends to the padding too, so `max_caption_tokens` must be the length that it
    was trained with: 512 for the published Wan models.
    """

    frames: int = 81
    fps: float = 16.0
    height: int = 480
    width: int = 832


class WanDecoder(ModalityDecoder):
    """Condition: `prompt_embeds` [P, E], zero behind the caption; there is no mask."""

    modality = "video"
    request_options: ClassVar = (
        *ModalityDecoder.request_options,
        "frames",
        "fps",
        "height",
        "width",
    )

    def __init__(self, config: WanConfig):
        super().__init__(config)
        self._check_size(config)

    def settings(self, **changes: Any) -> WanConfig:
        settings = super().settings(**changes)
        self._check_size(settings)
        return settings

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.component_config("transformer")["text_dim"]
        return {"prompt_embeds": (self.config.max_caption_tokens, width)}

    def _preprocess(self, medium: Video) -> Tensor:
        """Frames even in time, their centre -> float[3, F, H, W] in [-1, 1]."""
        size = (self.config.width, self.config.height)
        frames = [
            np.array(ImageOps.fit(PILImage.fromarray(frame), size, PILImage.Resampling.LANCZOS))
            for frame in sample_frames(medium, self.config.frames)
        ]
        return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1

    def _clean(self, caption: str) -> str:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return prompt_clean(caption)

    def _normalise(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1, 1)  # [C, 1, 1, 1]
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline = self.pipeline
        if pipeline.config.boundary_ratio is not None or pipeline.config.expand_timesteps:
            raise ConfigError(
                "video: the denoising loss knows Wan pipelines with one transformer and one time "
                "per clip; this one has two or times per token. Train its output projection by "
                "alignment alone (losses without 'denoise')"
            )
        return pipeline.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            return_dict=False,
        )[0]

    def _options(self, settings: WanConfig) -> dict[str, Any]:
        return {
            "num_frames": settings.frames,
            "height": settings.height,
            "width": settings.width,
        }

    def _media(self, output: Any, settings: WanConfig) -> list[Medium]:
        clips = (output.frames * 255).round().astype(np.uint8)  # [M, F, H, W, 3] from [0, 1]
        return [Video.from_numpy(clip, fps=settings.fps) for clip in clips]

    def _check_size(self, config: WanConfig) -> None:
        """The pipeline would round silently, and then latents and samples would differ in size."""
        vae = self.component_config("vae")
        if config.fps <= 0:
            raise ConfigError(f"fps: expected more than 0, got {config.fps}")
        # Wan 2.1 was published before its config held these two.
        group, shrink = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
        _, *patch = self.component_config("transformer")["patch_size"]
        if config.frames % group != 1 % group:
            raise ConfigError(
                f"frames: expected 1 + {group}k, got {config.frames}; "
                f"{config.frames // group * group + 1} would do"
            )
        for name, step in zip(("height", "width"), patch, strict=True):
            value = getattr(config, name)
            for unit in (16, shrink * step):  # 16: WanPipeline.check_inputs
                if value < 1 or value % unit:
                    raise ConfigError(f"{name}: expected a multiple of {unit}, got {value}")


def build(config: WanConfig) -> WanDecoder:
    return WanDecoder(config)
