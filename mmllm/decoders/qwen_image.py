"""Images by Qwen-Image (Qwen Team 2025): a DiT over packed latents, conditioned on a Qwen2.5-VL.

Legend: M media, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from mmllm.decoders.config import ImageConfig, Img2ImgConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import standardize
from mmllm.decoders.visual import ImageDecoder


@dataclass(frozen=True)
class QwenImageConfig(ImageConfig, SequenceConfig, Img2ImgConfig):
    """A `QwenImagePipeline`. Its authors guide away from a negative prompt of one space."""

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
    inpaint_class = "QwenImageInpaintPipeline"
    init_modality = "image"

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": (tokens, width), "prompt_embeds_mask": (tokens,)}

    def compute_size(self) -> tuple[int, int]:
        scale = 2 ** len(self.component_config("vae")["temperal_downsample"])
        return self.resolve_size((128 * scale, 128 * scale), 2 * scale)

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        tokens = self.config.max_caption_tokens
        embeds, mask = self.pipeline.encode_prompt(
            list(captions), self.device, max_sequence_length=tokens
        )
        if mask is None:  # every caption is as long as the longest
            mask = embeds.new_ones(embeds.shape[:2])
        padding = tokens - embeds.shape[1]
        return {
            "prompt_embeds": F.pad(embeds, (0, 0, 0, padding)),
            "prompt_embeds_mask": F.pad(mask, (0, padding)),
        }

    def encode_latents(self, samples: Tensor) -> Tensor:
        """Its codec is one of video: an image is a video of one frame."""
        return super().encode_latents(samples[:, :, None])[:, :, 0]

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return standardize(self.pipeline.vae, latents)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, (height, width) = self.pipeline, noisy.shape[2:]
        mask = condition["prompt_embeds_mask"]
        predicted = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
            timestep=timesteps / 1000,
            encoder_hidden_states_mask=mask,  # read as booleans: the product ties it to the loss
            encoder_hidden_states=condition["prompt_embeds"] * mask[..., None],
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            attention_kwargs={},
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(predicted, height, width, 1)[:, :, 0]

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        return {"true_cfg_scale": scale, **(self.negative_kwargs(negative()) if scale > 1 else {})}


def build(config: QwenImageConfig) -> QwenImageDecoder:
    return QwenImageDecoder(config)
