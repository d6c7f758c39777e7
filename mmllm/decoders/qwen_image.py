"""Pictures by Qwen-Image (Qwen Team 2025): a DiT over packed latents that reads a Qwen2.5-VL.

Legend: M pictures, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from mmllm.decoders.base import Condition, Img2ImgConfig, SequenceConfig
from mmllm.decoders.visual import ImageConfig, ImageDecoder


@dataclass(frozen=True)
class QwenImageConfig(ImageConfig, SequenceConfig, Img2ImgConfig):
    """A `QwenImagePipeline`. Its authors lead away from a negative caption of one space."""

    steps: int = 50
    guidance: float = 4.0
    negative_prompt: str = " "
    max_caption_tokens: int = 256


class QwenImageDecoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_embeds_mask` [P]."""

    pipelines: ClassVar = ["QwenImagePipeline"]
    masks: ClassVar = {"prompt_embeds": "prompt_embeds_mask"}
    passes_sigmas: ClassVar[bool] = True
    img2img_class = "QwenImageImg2ImgPipeline"
    init_modality = "image"

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": (tokens, width), "prompt_embeds_mask": (tokens,)}

    def _size(self) -> tuple[int, int]:
        shrink = 2 ** len(self.component_config("vae")["temperal_downsample"])
        return self._chosen((128 * shrink, 128 * shrink), 2 * shrink)

    def _read(self, captions: Sequence[str]) -> Condition:
        tokens = self.config.max_caption_tokens
        words, mask = self.pipeline.encode_prompt(
            list(captions), self.device, max_sequence_length=tokens
        )
        if mask is None:  # every caption is as long as the longest
            mask = words.new_ones(words.shape[:2])
        spare = tokens - words.shape[1]
        return {
            "prompt_embeds": F.pad(words, (0, 0, 0, spare)),
            "prompt_embeds_mask": F.pad(mask, (0, spare)),
        }

    def _mode(self, samples: Tensor) -> Tensor:
        """Its codec is one of clips: a picture is a clip of one frame."""
        return super()._mode(samples[:, :, None])[:, :, 0]

    def _normalise(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1)  # [C, 1, 1]
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, (height, width) = self.pipeline, noisy.shape[2:]
        mask = condition["prompt_embeds_mask"]
        predicted = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
            timestep=timesteps / 1000,
            encoder_hidden_states_mask=mask,  # read as booleans: only the product keeps its tie
            encoder_hidden_states=condition["prompt_embeds"] * mask[..., None],
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            attention_kwargs={},
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(predicted, height, width, 1)[:, :, 0]

    def _guidance(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        return {"true_cfg_scale": scale, **(self._guided(negative()) if scale > 1 else {})}


def build(config: QwenImageConfig) -> QwenImageDecoder:
    return QwenImageDecoder(config)
