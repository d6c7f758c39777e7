"""Sounds by AudioLDM (Liu et al. 2023): a UNet over mel spectrograms, told one CLAP vector.

Legend: M sounds, E the width of CLAP's joint space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmllm.decoders.base import Condition
from mmllm.decoders.mel import MelConfig, MelDecoder


@dataclass(frozen=True)
class AudioLDMConfig(MelConfig):
    """An `AudioLDMPipeline`."""

    steps: int = 25
    guidance: float = 2.5


class AudioLDMDecoder(MelDecoder):
    """Condition: `prompt_embeds` [E] of length 1, the text side of CLAP."""

    pipelines: ClassVar = ["AudioLDMPipeline"]

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.component_config("text_encoder")["projection_dim"],)}

    def _read(self, captions: list[str]) -> Condition:
        return {"prompt_embeds": self.pipeline._encode_prompt(captions, self.device, 1, False)}

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.unet(
            noisy,
            timesteps,
            encoder_hidden_states=None,
            class_labels=condition["prompt_embeds"],
            return_dict=False,
        )[0]


def build(config: AudioLDMConfig) -> AudioLDMDecoder:
    return AudioLDMDecoder(config)
