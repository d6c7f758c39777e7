"""Clips by Wan pipelines (Wan Team 2025): a DiT over space and time, its codec causal in time.

Legend: M clips, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmllm.decoders.base import Condition, Img2ImgConfig, SequenceConfig, read_index
from mmllm.decoders.visual import VideoConfig, VideoDecoder, check_frames, check_size
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class WanConfig(VideoConfig, SequenceConfig, Img2ImgConfig):
    """A `WanPipeline`. A clip's size is no part of its weights; the defaults are the pipeline's.

    The transformer attends to the padding too, so `max_caption_tokens` must be the length that it
    was trained with: 512 for the published Wan models.
    """

    frames: int = 81
    fps: float = 16.0
    height: int = 480
    width: int = 832


class WanDecoder(VideoDecoder):
    """Condition: `prompt_embeds` [P, E], zero behind the caption; there is no mask."""

    pipelines: ClassVar = ["WanPipeline"]

    def __init__(self, config: WanConfig):
        super().__init__(config)
        index = read_index(self.folder)
        self.img2img_class, self.init_modality = "WanVideoToVideoPipeline", "video"
        if index.get("expand_timesteps"):  # the first frame can stand still from the start
            self.img2img_class, self.init_modality = "WanImageToVideoPipeline", "image"
            self.init_one_by_one = True
        elif index.get("boundary_ratio") is not None:
            self.img2img_class = self.init_modality = ""
            if config.init_media != "none":
                raise ConfigError(
                    f"video: init_media {config.init_media!r}: {self.folder} has two "
                    "transformers and starts from noise alone; leave it out"
                )

    @property
    def request_options(self) -> tuple[str, ...]:
        names = super().request_options  # a first frame that stands still has no strength
        still = self.init_modality == "image"
        return tuple(name for name in names if not (still and name == "strength"))

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.component_config("transformer")["text_dim"]
        return {"prompt_embeds": (self.config.max_caption_tokens, width)}

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

    @property
    def max_side(self) -> int:
        """The table of rotary positions ends there."""
        *_, height, width = self._patch
        return self._positions * self._shrink * min(height, width)

    @property
    def max_frames(self) -> int:
        return (self._positions * self._patch[0] - 1) * self._group + 1

    @property
    def _positions(self) -> int:
        return self.component_config("transformer").get("rope_max_seq_len", 1024)

    @property
    def _patch(self) -> list[int]:
        """Latents in time, height and width that are one token."""
        return self.component_config("transformer")["patch_size"]

    # Wan 2.1 was published before its config held these two.

    @property
    def _group(self) -> int:
        return self.component_config("vae").get("scale_factor_temporal", 4)

    @property
    def _shrink(self) -> int:
        return self.component_config("vae").get("scale_factor_spatial", 8)

    def _size(self) -> tuple[int, int]:
        """The pipeline would round silently, and then latents and samples would differ in size."""
        config, shrink = self.config, self._shrink
        _, *patch = self._patch
        check_frames(config.frames, self._group)
        size = (config.height, config.width)
        check_size(size, (16, 16))  # WanPipeline.check_inputs
        check_size(size, (shrink * patch[0], shrink * patch[1]))
        return size


def build(config: WanConfig) -> WanDecoder:
    return WanDecoder(config)
