"""Images by Sana (Xie et al. 2024): a linear DiT that cross-attends to the states of a Gemma.

Legend: M media, P caption tokens, E their width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mmllm.decoders.config import ImageConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.prompts import encode_with_mask
from mmllm.decoders.visual import ImageDecoder, MaskedPrompt


@dataclass(frozen=True)
class SanaConfig(ImageConfig, SequenceConfig):
    """A `SanaPipeline`."""

    guidance: float = 4.5
    max_caption_tokens: int = 300


class GemmaPrompt(MaskedPrompt):
    """Condition: `prompt_embeds` [P, E] and `prompt_attention_mask` [P]: Gemma's states of a
    caption after the pipeline's own instruction; the negative prompt has no instruction."""

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        call = inspect.signature(self.pipeline.__call__).parameters
        instruction = call["complex_human_instruction"].default
        return encode_with_mask(self, captions, complex_human_instruction=instruction)

    def encode_negative_prompt(self, caption: str) -> Condition:
        return encode_with_mask(self, [caption], complex_human_instruction=None)

    def pipeline_kwargs(self) -> dict[str, Any]:
        # The default negative prompt "" would run the text encoder: ours is encoded already.
        own = {"negative_prompt": None, "use_resolution_binning": False}
        return own | super().pipeline_kwargs()


class SanaDecoder(GemmaPrompt, ImageDecoder):
    """A decoder of images."""

    pipelines: ClassVar = ["SanaPipeline"]

    def compute_size(self) -> tuple[int, int]:
        transformer = self.component_config("transformer")
        scale = 2 ** (len(self.component_config("vae")["encoder_block_out_channels"]) - 1)
        side = transformer["sample_size"] * scale
        return self.resolve_size((side, side), max(32, scale * transformer["patch_size"]))

    def encode_latents(self, samples: Tensor) -> Tensor:
        return self.pipeline.vae.encode(samples).latent  # its codec has no distribution

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        transformer = self.pipeline.transformer
        return transformer(
            noisy,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps * transformer.config.timestep_scale,
            return_dict=False,
        )[0]


def build(config: SanaConfig) -> SanaDecoder:
    return SanaDecoder(config)
