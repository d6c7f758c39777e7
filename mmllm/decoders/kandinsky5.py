"""Images and video by Kandinsky 5 (Kandinsky Lab 2025): a DiT over space and time, conditioned on a
Qwen2.5-VL and, through its modulation, on a CLIP.

Legend: M media, C latent channels, F latent frames, H x W latents, P caption tokens, E their width,
E2 the width of CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.conversation import Image, Medium
from mmllm.decoders.condition import encode_each, padded, unpadded
from mmllm.decoders.config import ImageConfig, SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.visual import ImageDecoder, VideoDecoder, VisualDecoder, check_frames, to_uint8
from mmllm.errors import ConfigError

IMAGE_SIZES = (
    *((1024, 1024), (1408, 640), (640, 1408), (1280, 768), (768, 1280), (1152, 896), (896, 1152)),
)
"""(height, width) of the pictures that `Kandinsky5T2IPipeline` makes; it takes any other size for
the nearest of these."""
_POSITIONS = 128
"""The end of the tables of rotary positions, along each axis of a picture."""
NEGATIVE_PROMPT = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, "
    "ugly, deformed, walking backwards"
)
"""The pipelines of video guide away from this, unless they are given another."""


@dataclass(frozen=True)
class Kandinsky5Config(ImageConfig, SequenceConfig):
    """A `Kandinsky5T2IPipeline`; the defaults are the pipeline's."""

    steps: int = 50
    guidance: float = 3.5
    max_caption_tokens: int = 256


@dataclass(frozen=True)
class Kandinsky5VideoConfig(VideoConfig, SequenceConfig):
    """A `Kandinsky5T2VPipeline`; the defaults are the pipeline's, the negative prompt included. The
    models without guidance take a `guidance` of 1, the distilled ones 16 `steps` of it."""

    steps: int = 50
    guidance: float = 5.0
    negative_prompt: str = NEGATIVE_PROMPT
    max_caption_tokens: int = 256
    frames: int = 121
    fps: float = 24.0


class KandinskyDecoder(VisualDecoder):
    """Condition: `prompt_embeds` [P, E] of the Qwen2.5-VL, `prompt_embeds_mask` [P] and
    `pooled_prompt_embeds` [E2] of the CLIP.

    The transformer attends to all positions that it is given, and knows no mask. So media are made
    one by one, each with its caption's own length.
    """

    masks: ClassVar = {"prompt_embeds": "prompt_embeds_mask"}
    samples_one_by_one: ClassVar[bool] = True
    caption_positions: ClassVar[int]
    """The end of the table of rotary positions of captions."""

    def configure(self) -> None:
        if self.config.max_caption_tokens > self.caption_positions:
            raise ConfigError(
                f"max_caption_tokens: expected at most {self.caption_positions}, got "
                f"{self.config.max_caption_tokens}"
            )
        super().configure()

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, transformer = self.config.max_caption_tokens, self.component_config("transformer")
        return {
            "prompt_embeds": (tokens, transformer["in_text_dim"]),
            "prompt_embeds_mask": (tokens,),
            "pooled_prompt_embeds": (transformer["in_text_dim2"],),
        }


class _Kandinsky5(KandinskyDecoder):
    """Captions are read one by one, too."""

    caption_positions: ClassVar[int] = 1024

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_each(captions, self._encode_one)

    def _encode_one(self, caption: str) -> Condition:
        tokens = self.config.max_caption_tokens
        embeds, pooled, _ = self.pipeline.encode_prompt(
            [caption], max_sequence_length=tokens, device=self.device
        )
        embeds, mask = padded(embeds, tokens)
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask,
            "pooled_prompt_embeds": pooled,
        }

    def condition_kwargs(self, condition: Condition) -> dict[str, Any]:
        """Of one medium."""
        ready = self.prepare_condition(condition)
        embeds = unpadded(ready["prompt_embeds"], ready["prompt_embeds_mask"])
        return {
            "prompt_embeds_qwen": embeds,
            "prompt_embeds_clip": ready["pooled_prompt_embeds"],
            "prompt_cu_seqlens": torch.tensor([0, embeds.shape[1]], device=embeds.device),
        }

    def call_transformer(
        self, condition: Condition, inputs: Tensor, timesteps: Tensor, **options: Any
    ) -> Tensor:
        """Call the transformer for one medium.

        Args:
            condition: as `prepare_condition` returns it, of one row.
            inputs: [1, F, H, W, C or more].
            timesteps: [1].
            **options: further arguments of the transformer.

        Returns:
            [1, F, H, W, C].
        """
        frames, height, width = inputs.shape[1:4]
        embeds = unpadded(condition["prompt_embeds"], condition["prompt_embeds_mask"])
        sides = (frames, height // 2, width // 2)
        return self.pipeline.transformer(
            hidden_states=inputs,
            encoder_hidden_states=embeds,
            pooled_projections=condition["pooled_prompt_embeds"],
            timestep=timesteps.to(inputs.dtype),
            visual_rope_pos=[torch.arange(side, device=inputs.device) for side in sides],
            text_rope_pos=torch.arange(embeds.shape[1], device=inputs.device),
            **options,
        ).sample


class Kandinsky5Decoder(_Kandinsky5, ImageDecoder):
    """A decoder of images. Its latents are not shifted, though the codec's config has a shift."""

    pipelines: ClassVar = ["Kandinsky5T2IPipeline"]

    def compute_size(self) -> tuple[int, int]:
        height, width = IMAGE_SIZES[0]
        size = (self.config.height or height, self.config.width or width)
        if size not in IMAGE_SIZES:
            known = ", ".join(f"{height}x{width}" for height, width in IMAGE_SIZES)
            raise ConfigError(
                f"height, width: expected one of the pipeline's own sizes, {known}, got "
                f"{size[0]}x{size[1]}"
            )
        return size

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """An image is a video of one frame, channels last."""
        inputs = noisy[:, :, None].movedim(1, -1)
        predicted = self.call_transformer(
            condition, inputs, timesteps, scale_factor=[1.0, 1.0, 1.0], sparse_params=None
        )
        return predicted.movedim(-1, 1)[:, :, 0]

    def to_media(self, output: Any) -> list[Medium]:
        return [Image.from_numpy(image) for image in to_uint8(output.image)]


class Kandinsky5VideoDecoder(_Kandinsky5, VideoDecoder):
    """A decoder of video."""

    pipelines: ClassVar = ["Kandinsky5T2VPipeline"]

    def configure(self) -> None:
        kind = self.component_config("transformer").get("attention_type", "regular")
        if kind != "regular":
            raise ConfigError(
                f"video: {self.folder}: a transformer with attention_type {kind!r}, as the models "
                "of 10 seconds have it; flex attention, which diffusers computes it by, ignores "
                "the blocks that are masked unless it is compiled; expected 'regular', a model of "
                "5 seconds"
            )
        if self.config.scheduler == "unipc":
            raise ConfigError(
                "scheduler: 'unipc' goes back to the latents of the step before, which "
                "Kandinsky5T2VPipeline overwrites; those that can: euler, dpm++"
            )
        super().configure()

    @property
    def _scale(self) -> int:
        """Pixels along a side of one latent."""
        return self.component_config("vae").get("spatial_compression_ratio", 8)

    @property
    def max_side(self) -> int:
        return 2 * _POSITIONS * self._scale

    @property
    def max_frames(self) -> int:
        return (_POSITIONS - 1) * self._group + 1

    @property
    def _group(self) -> int:
        """Frames that share a latent."""
        return self.component_config("vae").get("temporal_compression_ratio", 4)

    def compute_size(self) -> tuple[int, int]:
        check_frames(self.config.frames, self._group)
        return self.resolve_size((512, 768), math.lcm(16, 2 * self._scale))

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Channels last; a model that can also start from frames is given none."""
        pipeline, inputs = self.pipeline, noisy.movedim(1, -1)
        if pipeline.transformer.visual_cond:
            no_frames = inputs.new_zeros(*inputs.shape[:-1], inputs.shape[-1] + 1)
            inputs = torch.cat([inputs, no_frames], dim=-1)
        return self.call_transformer(
            condition,
            inputs,
            timesteps,
            scale_factor=pipeline._get_scale_factor(*self.size),
            sparse_params=None,
        ).movedim(-1, 1)


def build(config: Kandinsky5Config | Kandinsky5VideoConfig) -> _Kandinsky5:
    if isinstance(config, Kandinsky5VideoConfig):
        return Kandinsky5VideoDecoder(config)
    return Kandinsky5Decoder(config)
