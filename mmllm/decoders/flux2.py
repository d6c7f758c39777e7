"""Pictures by FLUX.2 (Black Forest Labs 2025): a DiT over packed latents, told the states of three
layers of a Mistral (dev) or a Qwen3 (klein).

Legend: M pictures, C latent channels, P caption tokens, E the width of the three layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.decoders.base import Condition, InitMediaConfig, SequenceConfig
from mmllm.decoders.visual import ImageConfig, ImageDecoder, vae_scale_factor
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class Flux2Config(ImageConfig, SequenceConfig, InitMediaConfig):
    """A `Flux2Pipeline`, whose transformer is told `guidance` and knows no negative caption, or a
    `Flux2KleinPipeline`, which is guided by two calls; its distilled models take a `guidance` of 1
    and 4 `steps`."""

    steps: int = 50
    guidance: float = 4.0
    max_caption_tokens: int = 512


class Flux2Decoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E], padding included."""

    pipelines: ClassVar = ["Flux2Pipeline", "Flux2KleinPipeline"]
    init_modality = "image"
    init_one_by_one = True  # several would all be shown to every caption

    def __init__(self, config: Flux2Config):
        super().__init__(config)
        self.embeds_guidance = self.pipeline_class == "Flux2Pipeline"
        if self.embeds_guidance and config.negative_prompt:
            raise ConfigError("negative_prompt: a Flux2Pipeline takes no negative caption")

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.component_config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": (self.config.max_caption_tokens, width)}

    def _size(self) -> tuple[int, int]:
        shrink = vae_scale_factor(self)
        return self._chosen((128 * shrink, 128 * shrink), 2 * shrink)

    def _read(self, captions: Sequence[str]) -> Condition:
        words, _ = self.pipeline.encode_prompt(
            list(captions), self.device, max_sequence_length=self.config.max_caption_tokens
        )
        return {"prompt_embeds": words}

    def _normalise(self, latents: Tensor) -> Tensor:
        """[M, C, 2h, 2w] -> [M, 4C, h, w], by the statistics of the codec's batch norm."""
        vae, patches = self.pipeline.vae, self.pipeline._patchify_latents(latents)
        mean, variance = (
            value.view(1, -1, 1, 1).to(patches)
            for value in (vae.bn.running_mean, vae.bn.running_var)
        )
        return (patches - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, words, guidance = self.pipeline, condition["prompt_embeds"], None
        if self.embeds_guidance:
            guidance = torch.full([len(noisy)], self.config.guidance, device=noisy.device)
        predicted = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy),
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=words,
            txt_ids=pipeline._prepare_text_ids(words).to(noisy.device),
            img_ids=pipeline._prepare_latent_ids(noisy).to(noisy.device),
            return_dict=False,
        )[0]
        return predicted.transpose(1, 2).reshape(noisy.shape)

    def _start_from(self, sources: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """The same pipeline: a picture is a part of what it is told, beside the caption."""
        return self.pipeline, {"image": self._fitted(sources[0])}

    def _guidance(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        return (
            {"guidance_scale": scale}
            if self.embeds_guidance
            else super()._guidance(scale, negative)
        )


def build(config: Flux2Config) -> Flux2Decoder:
    return Flux2Decoder(config)
