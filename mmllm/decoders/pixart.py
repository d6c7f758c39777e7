"""Pictures by PixArt-alpha pipelines (Chen et al. 2023): a DiT that cross-attends to a T5 caption.

Legend: M pictures, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Image, Medium
from mmllm.decoders.base import Condition, SequenceConfig
from mmllm.decoders.visual import MaskedCaptions, PictureDecoder, shrinkage


@dataclass(frozen=True)
class PixArtConfig(SequenceConfig):
    """A `PixArtAlphaPipeline`; pictures have the size that its transformer was trained for."""


class PixArtDecoder(MaskedCaptions, PictureDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_attention_mask` [P]."""

    pipelines: ClassVar = ["PixArtAlphaPipeline"]
    min_steps: ClassVar[int] = (
        2  # with one, the pipeline reads a clean sample that few solvers give
    )

    def _size(self) -> tuple[int, int]:
        side = self.component_config("transformer")["sample_size"] * shrinkage(self)
        return side, side

    def _clean(self, caption: str) -> str:
        # The optional deep cleaning (URLs, file names) would depend on what else is installed.
        return self.pipeline._text_preprocessing(caption, clean_caption=False)[0]

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        transformer = self.pipeline.transformer
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.config.sample_size == 128:  # the pipeline's own test for its 1024-px models
            added["resolution"] = noisy.new_full((len(noisy), 2), self.size[0])
            added["aspect_ratio"] = noisy.new_ones(len(noisy), 1)
        return transformer(
            noisy,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _options(self) -> dict[str, Any]:
        # Its default negative "" would have to go through the text encoder: ours are embeddings.
        return {"negative_prompt": None, "use_resolution_binning": False}

    def _preview(self, latents: Tensor) -> list[Medium]:
        """At most 128 pixels on a side."""
        vae = self.pipeline.vae
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        small = F.interpolate(pixels.float(), min(pixels.shape[-1], 128), mode="area")
        bytes_ = ((small.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return [Image.from_numpy(picture) for picture in bytes_.cpu().numpy()]


def build(config: PixArtConfig) -> PixArtDecoder:
    return PixArtDecoder(config)
