"""Pictures by Stable Diffusion 1.x and 2.x (Rombach et al. 2022): a UNet that attends to CLIP.

Legend: M pictures, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmllm.decoders.base import Condition
from mmllm.decoders.visual import PictureConfig, PictureDecoder, shrinkage


@dataclass(frozen=True)
class StableDiffusionConfig(PictureConfig):
    """A `StableDiffusionPipeline`."""

    steps: int = 25
    guidance: float = 7.5


class StableDiffusionDecoder(PictureDecoder):
    """Condition: `prompt_embeds` [P, E], all P positions of the CLIP text encoder."""

    pipelines: ClassVar = ["StableDiffusionPipeline"]

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.component_config("tokenizer")["model_max_length"]
        return {"prompt_embeds": (tokens, self.component_config("text_encoder")["hidden_size"])}

    def _size(self) -> tuple[int, int]:
        side = self.component_config("unet")["sample_size"] * shrinkage(self)
        return self._chosen((side, side), 8)

    def _read(self, captions: list[str]) -> Condition:
        return {"prompt_embeds": self.pipeline.encode_prompt(captions, self.device, 1, False)[0]}

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.unet(
            noisy, timesteps, encoder_hidden_states=condition["prompt_embeds"], return_dict=False
        )[0]


def build(config: StableDiffusionConfig) -> StableDiffusionDecoder:
    return StableDiffusionDecoder(config)
