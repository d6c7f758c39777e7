"""Pictures by Sana (Xie et al. 2024): a linear DiT that cross-attends to a Gemma's states.

Legend: M pictures, P caption tokens, E their width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mmllm.decoders.base import Condition, SequenceConfig
from mmllm.decoders.visual import ImageConfig, ImageDecoder, MaskedCaptions


@dataclass(frozen=True)
class SanaConfig(ImageConfig, SequenceConfig):
    """A `SanaPipeline`."""

    guidance: float = 4.5
    max_caption_tokens: int = 300


class SanaDecoder(MaskedCaptions, ImageDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_attention_mask` [P]: the states of a caption
    that Gemma read behind the pipeline's own instruction; the negative caption stands alone."""

    pipelines: ClassVar = ["SanaPipeline"]

    def _size(self) -> tuple[int, int]:
        transformer = self.component_config("transformer")
        shrink = 2 ** (len(self.component_config("vae")["encoder_block_out_channels"]) - 1)
        side = transformer["sample_size"] * shrink
        return self._chosen((side, side), max(32, shrink * transformer["patch_size"]))

    def _read(self, captions: Sequence[str]) -> Condition:
        call = inspect.signature(self.pipeline.__call__).parameters
        return self._states(captions, call["complex_human_instruction"].default)

    def _read_negative(self, caption: str) -> Condition:
        return self._states([caption], None)

    def _states(self, captions: Sequence[str], instruction: list[str] | None) -> Condition:
        words, mask, _, _ = self.pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.config.max_caption_tokens,
            complex_human_instruction=instruction,
        )
        return {"prompt_embeds": words, "prompt_attention_mask": mask}

    def _mode(self, samples: Tensor) -> Tensor:
        return self.pipeline.vae.encode(samples).latent  # its codec knows no distribution

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        transformer = self.pipeline.transformer
        return transformer(
            noisy,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps * transformer.config.timestep_scale,
            return_dict=False,
        )[0]

    def _options(self) -> dict[str, Any]:
        # Its default negative "" would have to go through the text encoder: ours are embeddings.
        return {"negative_prompt": None, "use_resolution_binning": False, **super()._options()}


def build(config: SanaConfig) -> SanaDecoder:
    return SanaDecoder(config)
