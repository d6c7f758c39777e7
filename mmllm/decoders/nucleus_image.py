"""Images by Nucleus-Image (Nucleus AI 2026): a DiT with experts that choose their tokens, which
attends to the states of a Qwen3-VL.

Legend: M media, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmllm.decoders.config import ImageConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.qwen_image import QwenCaptions
from mmllm.errors import ConfigError

_CAPTION_UNIT = 8
"""The pipeline pads captions to multiples of these tokens."""


@dataclass(frozen=True)
class NucleusImageConfig(ImageConfig, SequenceConfig):
    """A `NucleusMoEImagePipeline`, whose steps and guidance these are; it reads up to 1024 caption
    tokens."""

    steps: int = 50
    guidance: float = 4.0
    max_caption_tokens: int = 512


class NucleusImageDecoder(QwenCaptions):
    """Condition: `prompt_embeds` [P, E] and `prompt_embeds_mask` [P]."""

    pipelines: ClassVar = ["NucleusMoEImagePipeline"]
    passes_sigmas: ClassVar[bool] = True

    def configure(self) -> None:
        super().configure()
        if (tokens := self.config.max_caption_tokens) % _CAPTION_UNIT:
            raise ConfigError(
                f"max_caption_tokens: expected a multiple of {_CAPTION_UNIT}, got {tokens}"
            )

    @property
    def patch_size(self) -> int:
        return self.component_config("transformer").get("patch_size", 2)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, patch = self.pipeline, self.patch_size
        height, width = noisy.shape[2:]
        mask = condition["prompt_embeds_mask"]
        predicted = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, *noisy.shape, patch),
            timestep=timesteps / pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=condition["prompt_embeds"] * mask[..., None],
            encoder_hidden_states_mask=mask,  # read as booleans: the product ties it to the loss
            img_shapes=[(1, height // patch, width // patch)] * len(noisy),
            attention_kwargs={},
            return_dict=False,
        )[0]
        scale = pipeline.vae_scale_factor
        size = (height * scale, width * scale)
        return -pipeline._unpack_latents(predicted, *size, patch, scale)[:, :, 0]


def build(config: NucleusImageConfig) -> NucleusImageDecoder:
    return NucleusImageDecoder(config)
