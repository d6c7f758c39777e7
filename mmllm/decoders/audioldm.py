"""Audio by AudioLDM (Liu et al. 2023): a UNet over mel spectrograms, conditioned on a CLAP vector.

Legend: M media, E width of CLAP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmllm.decoders.contract import Condition
from mmllm.decoders.mel import MelConfig, MelDecoder


@dataclass(frozen=True)
class AudioLDMConfig(MelConfig):
    """An `AudioLDMPipeline`."""

    steps: int = 25
    guidance: float = 2.5


class AudioLDMDecoder(MelDecoder):
    """Condition: `prompt_embeds` [E], CLAP's text embedding, of unit length."""

    pipelines: ClassVar = ["AudioLDMPipeline"]

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.component_config("text_encoder")["projection_dim"],)}

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        embeds = self.pipeline._encode_prompt(list(captions), self.device, 1, False)
        return {"prompt_embeds": embeds}

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.unet(
            noisy,
            timesteps,
            encoder_hidden_states=None,
            class_labels=condition["prompt_embeds"],
            return_dict=False,
        )[0]


def build(config: AudioLDMConfig) -> AudioLDMDecoder:
    return AudioLDMDecoder(config)
