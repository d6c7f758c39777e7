"""Video by Wan pipelines (Wan Team 2025): a DiT over space and time, with a codec causal in time.

Legend: M media, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from mmllm.conversation import Image, Medium
from mmllm.decoders.config import Img2ImgConfig, SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import standardize
from mmllm.decoders.loading import read_model_index
from mmllm.decoders.prompts import encode_with_t5
from mmllm.decoders.visual import VideoDecoder, check_frames, check_size
from mmllm.errors import ConfigError
from mmllm.media.preprocessing import preprocessing


@dataclass(frozen=True)
class ExpertsConfig:
    """Of pipelines that may have two transformers (Wan 2.2 A14B), for noisier and cleaner steps.

    Attributes:
        guidance_2: guidance of the second transformer, diffusers' `guidance_scale_2`; by default
            that of the first.
    """

    guidance_2: float | None = None


@dataclass(frozen=True)
class WanConfig(ExpertsConfig, VideoConfig, SequenceConfig, Img2ImgConfig):
    """A `WanPipeline`. The weights do not fix the size; the defaults are the pipeline's.

    The transformer attends to the padding too, so `max_caption_tokens` must be the length that it
    was trained with: 512 for the published Wan models.
    """

    frames: int = 81
    fps: float = 16.0
    height: int = 480
    width: int = 832


class WanBase(VideoDecoder):
    """Condition: `prompt_embeds` [P, E], zero after the caption; there is no mask."""

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.component_config("transformer")["text_dim"]
        return {"prompt_embeds": (self.config.max_caption_tokens, width)}

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_with_t5(self, captions)

    def clean_prompt(self, caption: str) -> str:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return prompt_clean(caption)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return standardize(self.pipeline.vae, latents)

    def configure(self) -> None:
        if self.config.guidance_2 is not None and not self.has_two_experts:
            raise ConfigError(
                f"guidance_2: the pipeline in {self.folder} has one transformer, whose guidance is "
                "`guidance`; leave guidance_2 out"
            )
        super().configure()

    @property
    def has_two_experts(self) -> bool:
        """Whether cleaner steps have a transformer of their own."""
        return read_model_index(self.folder).get("boundary_ratio") is not None

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        kwargs = super().guidance_kwargs(scale, negative)
        if self.config.guidance_2 is not None and scale > 1:
            kwargs["guidance_scale_2"] = self.config.guidance_2
        return kwargs

    def check_trainable(self) -> None:
        """Raise ConfigError if the pipeline has no denoising loss of one network and one time."""
        config = self.pipeline.config
        if config.get("boundary_ratio") is not None or config.get("expand_timesteps"):
            raise ConfigError(
                "video: the denoising loss supports Wan pipelines with one transformer and one "
                "time per video; this one has two, or times per token. Train its output "
                "projection by alignment alone (losses without 'denoise')"
            )

    @property
    def max_side(self) -> int:
        """The end of the table of rotary positions."""
        *_, height, width = self._patch
        return self._positions * self._spatial_scale * min(height, width)

    @property
    def max_frames(self) -> int:
        return (self.max_latent_frames - 1) * self._temporal_scale + 1

    @property
    def max_latent_frames(self) -> int:
        """The end of the table of rotary positions, in latents in time."""
        return self._positions * self._patch[0]

    @property
    def latent_frames(self) -> int:
        """How many latents in time a video of the config has."""
        return (self.config.frames - 1) // self._temporal_scale + 1

    @property
    def _positions(self) -> int:
        return self.component_config("transformer").get("rope_max_seq_len", 1024)

    @property
    def _patch(self) -> list[int]:
        """Latents in time, height and width of one token."""
        return self.component_config("transformer")["patch_size"]

    # Configs of Wan 2.1 lack these two.

    @property
    def _temporal_scale(self) -> int:
        return self.component_config("vae").get("scale_factor_temporal", 4)

    @property
    def _spatial_scale(self) -> int:
        return self.component_config("vae").get("scale_factor_spatial", 8)

    def compute_size(self) -> tuple[int, int]:
        config, scale = self.config, self._spatial_scale
        _, *patch = self._patch
        check_frames(config.frames, self._temporal_scale)
        size = (config.height, config.width)
        check_size(size, (16, 16))  # WanPipeline.check_inputs
        check_size(size, (scale * patch[0], scale * patch[1]))
        return size


class WanDecoder(WanBase):
    """Video from captions, or from a medium where the folder's weights can start from one."""

    pipelines: ClassVar = ["WanPipeline"]

    def __init__(self, config: WanConfig):
        super().__init__(config)
        index = read_model_index(self.folder)
        self.img2img_class, self.init_modality = "WanVideoToVideoPipeline", "video"
        if index.get("expand_timesteps"):  # the first frame can be given
            self.img2img_class, self.init_modality = "WanImageToVideoPipeline", "image"
            self.init_one_by_one = True
        elif self.has_two_experts:
            self.img2img_class = self.init_modality = ""
            if config.init_media != "none":
                raise ConfigError(
                    f"video: init_media {config.init_media!r}: {self.folder} has two "
                    "transformers and starts from noise alone; leave it out"
                )

    @property
    def request_options(self) -> tuple[str, ...]:
        names = super().request_options
        if self.init_modality == "image":  # a given first frame has no strength
            return tuple(name for name in names if name != "strength")
        return names

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        self.check_trainable()
        return self.pipeline.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            return_dict=False,
        )[0]


class WanReferenceBase(WanBase):
    """References are kept as pixels, float[3, H, W] in [-1, 1], where other families keep latents:
    what the codec makes of a picture depends on the frames around it, and an image encoder reads
    it, too."""

    def fit_reference(self, medium: Image) -> PILImage.Image:
        """Bring a reference to our size.

        Args:
            medium: the reference.
        """
        return self.fit(medium)

    def preprocess(self, medium: Medium) -> Tensor:
        """A video, or an image that is a reference: float[3, H, W]."""
        if not isinstance(medium, Image):
            return super().preprocess(medium)
        with preprocessing(medium, "the video decoder"):
            pixels = torch.from_numpy(np.array(self.fit_reference(medium)))
            return pixels.permute(2, 0, 1) / 127.5 - 1

    def encode_latents(self, samples: Tensor) -> Tensor:
        return samples if _are_pictures(samples) else super().encode_latents(samples)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return latents if _are_pictures(latents) else super().normalize_latents(latents)


def _are_pictures(samples: Tensor) -> bool:
    """Whether a batch is of references: videos and their latents also have an axis of time."""
    return samples.ndim == 4


def build(config: WanConfig) -> WanDecoder:
    return WanDecoder(config)
