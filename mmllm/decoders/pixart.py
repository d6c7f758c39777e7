"""Pictures by PixArt-alpha pipelines (Chen et al. 2023): a DiT that cross-attends to a T5 caption.

Legend: M pictures, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Image, Medium
from mmllm.decoders.base import Condition, DecoderConfig, ModalityDecoder


@dataclass(frozen=True)
class PixArtConfig(DecoderConfig):
    """A `PixArtAlphaPipeline`; pictures have the size that its transformer was trained for."""


class PixArtDecoder(ModalityDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_attention_mask` [P]."""

    modality = "image"
    masks: ClassVar = {"prompt_embeds": "prompt_attention_mask"}
    min_steps: ClassVar[int] = (
        2  # with one, the pipeline reads a clean sample that few solvers give
    )

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["caption_channels"]
        return {"prompt_embeds": (tokens, width), "prompt_attention_mask": (tokens,)}

    @property
    def size(self) -> int:
        """Pixels on a side."""
        levels = len(self.component_config("vae")["block_out_channels"])
        return self.component_config("transformer")["sample_size"] * 2 ** (levels - 1)

    def _preprocess(self, medium: Image) -> Tensor:
        """The central square -> float[3, H, W] in [-1, 1]."""
        picture = ImageOps.fit(medium.to_pil(), (self.size, self.size), PILImage.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return pixels / 127.5 - 1

    def _clean(self, caption: str) -> str:
        # The optional deep cleaning (URLs, file names) would depend on what else is installed.
        return self.pipeline._text_preprocessing(caption, clean_caption=False)[0]

    def _normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipeline.vae.config.scaling_factor

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        transformer = self.pipeline.transformer
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.config.sample_size == 128:  # the pipeline's own test for its 1024-px models
            added["resolution"] = noisy.new_full((len(noisy), 2), self.size)
            added["aspect_ratio"] = noisy.new_ones(len(noisy), 1)
        return transformer(
            noisy,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _options(self, settings: PixArtConfig) -> dict[str, Any]:
        # Its default negative "" would have to go through the text encoder: ours are embeddings.
        return {"negative_prompt": None, "use_resolution_binning": False}

    def _preview(self, latents: Tensor) -> list[Medium]:
        """At most 128 pixels on a side."""
        vae = self.pipeline.vae
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        small = F.interpolate(pixels.float(), min(pixels.shape[-1], 128), mode="area")
        bytes_ = ((small.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return [Image.from_numpy(picture) for picture in bytes_.cpu().numpy()]

    def _media(self, output: Any, settings: PixArtConfig) -> list[Medium]:
        pixels = (output.images * 255).round().astype(np.uint8)  # [M, H, W, 3] from [0, 1]
        return [Image.from_numpy(picture) for picture in pixels]


def build(config: PixArtConfig) -> PixArtDecoder:
    return PixArtDecoder(config)
