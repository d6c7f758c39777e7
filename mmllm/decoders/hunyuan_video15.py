"""Video by HunyuanVideo 1.5 (Tencent 2025): a DiT over space and time, conditioned on a Qwen2.5-VL
and, for words that are to be seen in the picture, on a ByT5.

Legend: M media, F frames, H x W pixels, P caption tokens, E their width, Q bytes of the words to be
seen, G their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.decoders.config import SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.visual import VideoDecoder, check_frames

_GLYPH_TOKENS = 256
"""Q, as the pipeline pads them."""


@dataclass(frozen=True)
class HunyuanVideo15Config(VideoConfig, SequenceConfig):
    """A `HunyuanVideo15Pipeline`; the frames and steps are the pipeline's, which reads up to 1000
    caption tokens."""

    steps: int = 50
    guidance: float = 6.0
    max_caption_tokens: int = 256
    frames: int = 121
    fps: float = 24.0


class HunyuanVideo15Decoder(VideoDecoder):
    """Condition: `prompt_embeds` [P, E], `prompt_embeds_mask` [P], and of the words between
    quotation marks `glyph_embeds` [Q, G] and `glyph_mask` [Q], which is empty without such
    words."""

    pipelines: ClassVar = ["HunyuanVideo15Pipeline"]
    masks: ClassVar = {"prompt_embeds": "prompt_embeds_mask", "glyph_embeds": "glyph_mask"}
    passes_sigmas: ClassVar[bool] = True

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, transformer = self.config.max_caption_tokens, self.component_config("transformer")
        return {
            "prompt_embeds": (tokens, transformer["text_embed_dim"]),
            "prompt_embeds_mask": (tokens,),
            "glyph_embeds": (_GLYPH_TOKENS, transformer["text_embed_2_dim"]),
            "glyph_mask": (_GLYPH_TOKENS,),
        }

    def compute_size(self) -> tuple[int, int]:
        vae, transformer = self.component_config("vae"), self.component_config("transformer")
        check_frames(self.config.frames, vae["temporal_compression_ratio"])
        scale = vae["spatial_compression_ratio"]
        return self.resolve_size(self._default(scale), scale * transformer["patch_size"])

    def _default(self, scale: int) -> tuple[int, int]:
        """The size (H, W) that the pipeline chooses: 16 : 9 of the area that it was trained at."""
        from diffusers.pipelines.hunyuan_video1_5 import image_processor

        target = self.component_config("transformer").get("target_size", 640)
        processor = image_processor.HunyuanVideo15ImageProcessor(vae_scale_factor=scale)
        return processor.calculate_default_height_width(9, 16, target)

    def on_loaded(self, pipeline: Any) -> None:
        """In diffusers 0.42 the codec's mask is wrong for more than one video: it takes them one by
        one."""
        pipeline.vae.enable_slicing()

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        pipeline = self.pipeline
        embeds, mask = pipeline._get_mllm_prompt_embeds(
            pipeline.text_encoder,
            pipeline.tokenizer,
            list(captions),
            self.device,
            tokenizer_max_length=self.config.max_caption_tokens,
            system_message=pipeline.system_message,
            crop_start=pipeline.prompt_template_encode_start_idx,
        )
        glyphs, glyph_mask = pipeline._get_byt5_prompt_embeds(
            pipeline.tokenizer_2,
            pipeline.text_encoder_2,
            list(captions),
            self.device,
            _GLYPH_TOKENS,
        )
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask,
            "glyph_embeds": glyphs,
            "glyph_mask": glyph_mask,
        }

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Every call also takes a picture to start from, which is empty here."""
        pipeline, settings = self.pipeline, self.pipeline.transformer.config
        mask, glyph_mask = condition["prompt_embeds_mask"], condition["glyph_mask"]
        no_frames = pipeline.prepare_cond_latents_and_mask(noisy, noisy.dtype, noisy.device)
        return pipeline.transformer(
            hidden_states=torch.cat([noisy, *no_frames], dim=1),
            image_embeds=noisy.new_zeros(
                len(noisy), pipeline.vision_num_semantic_tokens, settings.image_embed_dim
            ),
            timestep=timesteps.to(noisy.dtype),
            encoder_hidden_states=condition["prompt_embeds"] * mask[..., None],
            encoder_attention_mask=mask,
            encoder_hidden_states_2=condition["glyph_embeds"] * glyph_mask[..., None],
            encoder_attention_mask_2=glyph_mask,
            return_dict=False,
        )[0]

    def prepare_condition(self, condition: Condition) -> Condition:
        """The mask of the words to be seen may stay empty."""
        glyph_mask = condition["glyph_mask"].to(self.device, self.dtype)
        is_real = (glyph_mask > 0.5).to(self.dtype)
        return super().prepare_condition(condition) | {"glyph_mask": is_real + 0.0 * glyph_mask}

    def condition_kwargs(self, condition: Condition) -> dict[str, Any]:
        ready = self.prepare_condition(condition)
        return {
            "prompt_embeds": ready["prompt_embeds"],
            "prompt_embeds_mask": ready["prompt_embeds_mask"],
            "prompt_embeds_2": ready["glyph_embeds"],
            "prompt_embeds_mask_2": ready["glyph_mask"],
        }

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        """The scale is one of the pipeline's guider, a component."""
        self.pipeline.guider.guidance_scale = max(scale, 1.0)
        return self.negative_kwargs(negative()) if scale > 1 else {}


def build(config: HunyuanVideo15Config) -> HunyuanVideo15Decoder:
    return HunyuanVideo15Decoder(config)
